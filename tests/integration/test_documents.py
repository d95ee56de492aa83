"""The programs in the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def programs(name: str) -> list[str]:
    """The blocks of Python of a page, in order."""
    text = (DOCS / name).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_use_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = programs("python.md")
    assert len(blocks) == 3
    assert len([line for line in blocks[0].splitlines() if line]) <= 20
    for block in blocks:
        exec(compile(block, "python.md", "exec"), names)
    assert (tmp_path / "runs/notebook/best/model.safetensors").is_file()
    assert (tmp_path / "runs/my_loop/model.safetensors").is_file()
    assert "decoder/0/class" in capsys.readouterr().out
