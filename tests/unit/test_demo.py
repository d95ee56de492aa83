"""What the demo cannot serve."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from detrelay.apps import cli
from detrelay.apps.demo import Arguments, demo

pytest.importorskip("gradio", reason="needs gradio (the extra `demo`)")


def test_what_cannot_be_served_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--port must be between 0 and 65535, found 70000"):
        demo(Arguments(Path("nowhere"), port=70000))
    with pytest.raises(ValueError, match="name --data too"):
        demo(Arguments(Path("nowhere"), images=Path("images")))
    with pytest.raises(ValueError, match="nowhere: no saved model"):
        demo(Arguments(Path("nowhere")))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"needs gradio, .*: pip install 'detrelay\[demo\]'"):
        demo(Arguments(Path("nowhere")))
    assert "demo" in cli.COMMANDS
