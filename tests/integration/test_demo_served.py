"""The demo as a browser and a client of its interface meet it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrelay.apps import demo
from factories_data import write_shapes
from hub_model import small_model, write_run
from tiny_run import shrink_backbone

pytest.importorskip("gradio", reason="needs gradio (the extra `demo`)")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page, served by this process."""
    from detrelay.apps.demo_page import launch

    folder = tmp_path_factory.mktemp("demo")
    write_shapes(folder / "shapes", category_ids=(7, 3, 90, 11))
    truth = folder / "shapes" / "val.json"
    truth.write_text(truth.read_text().replace('"cross"', '"cross | x"'))  # as the model says
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        model = write_run(folder / "run", small_model())
        # cross-stage labels would be none: boxes of an untrained model meet no object
        arguments = demo.Arguments(model, data=truth, assigner="hungarian", port=0)
        page = launch(demo.make_demo(arguments), host="127.0.0.1", port=0, block=False)
    yield page.local_url
    page.close()


@pytest.mark.slow
def test_a_client_looks_through_the_stages(address: str) -> None:
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False)
    image, objects = client.predict(0, api_name="/choose")
    assert len(objects.splitlines()) >= 1
    client.predict(handle_file(image), objects, api_name="/look")
    answers = [client.predict(stage, 0.0, 1.0, api_name="/show") for stage in (1, 4)]
    assert [answer[3].partition(":")[0] for answer in answers] == ["Stage 1", "Stage 4"]
    first, last = (np.asarray(Image.open(answer[0])) for answer in answers)
    assert not np.array_equal(first, last)
    assert len(answers[0][2]["data"]) == len(objects.splitlines())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_page(address: str, tmp_path: Path) -> None:
    target = tmp_path / "page.png"
    subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--virtual-time-budget=20000", "--window-size=1200,900"),
            *(f"--screenshot={target}", f"--user-data-dir={tmp_path / 'profile'}", address),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )  # fmt: skip
    with Image.open(target) as page:
        colors = page.convert("RGB").getcolors(1 << 20)
    assert colors is not None
    assert len(colors) > 100  # text, sliders, the button; an empty page has one
