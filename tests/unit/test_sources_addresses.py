"""Images at HTTP addresses."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixed_model import Fixed, rows, run


@pytest.fixture
def asked() -> list[str | None]:
    """What the server was told of who asks."""
    return []


@pytest.fixture
def served(photos: Path, asked: list[str | None]) -> Iterator[str]:
    """The photos on an http server of this process."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            super().do_GET()

    handler = functools.partial(Quiet, directory=str(photos))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_images_at_addresses(
    model: Fixed,
    served: str,
    asked: list[str | None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(input=f"{served}/a.png", output=tmp_path / "one") == 0
    assert {row["file_name"] for row in rows(tmp_path / "one")} == {f"{served}/a.png"}
    flat = f"{served}/a.png".replace("://", "__").replace(":", "").replace("/", "__")
    assert (tmp_path / "one" / f"{flat}.png").is_file()
    secret = served.replace("//", "//user:password@")
    (tmp_path / "list.txt").write_text(f"{secret}/b.png\n{secret}/gone.png\n")
    assert run(input=tmp_path / "list.txt", output=tmp_path / "two") == 1
    captured = capsys.readouterr()
    assert f"skipped {served}/gone.png: cannot fetch image" in captured.err
    assert "password" not in captured.err + captured.out
    assert asked == [None, *2 * ["Basic dXNlcjpwYXNzd29yZA=="]]
