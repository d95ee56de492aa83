"""Serve a web page for trying out a saved model, stage by stage.

detrelay demo runs/stageinteractor-cross_stage/best
detrelay demo USER/MODEL --data val.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import tyro

from detrelay.apps.console import Debug, read_arguments, run

if TYPE_CHECKING:
    from detrelay.apps.demo_page import Demo

_LOWEST_PORT, _HIGHEST_PORT = 0, 65535


@dataclass(frozen=True)
class Arguments:
    """Serve a page for trying out a saved model."""

    model: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="MODEL")]]
    """Folder of a saved model, or its name on the Hub."""
    data: Path | None = None
    """COCO json, or another dataset, whose images and objects to offer."""
    images: Path | None = None
    """Folder of the images of --data; looked for near the json if not given."""
    assigner: str = "cross_stage"
    """Assigner whose labels to show beside each stage's own matching."""
    head: str | None = None
    """The model's head as module:ConfigClass, for a custom head."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 accepts other machines."""
    port: int = 7860
    """Port to listen on; 0 for any free one."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps, ...; a GPU if there is one."""
    debug: Debug = False


def demo(arguments: Arguments) -> int:
    """Serve the page until interrupted; returns the exit code."""
    if not _LOWEST_PORT <= arguments.port <= _HIGHEST_PORT:
        raise ValueError(
            f"--port must be between {_LOWEST_PORT} and {_HIGHEST_PORT}, found {arguments.port}"
        )
    if arguments.images is not None and arguments.data is None:
        raise ValueError("--images is the folder of the images of --data; name --data too")
    try:
        import gradio  # noqa: F401 - before the model is loaded
    except ImportError:
        raise ValueError(
            "the demo needs gradio, which is not installed: pip install 'detrelay[demo]'"
        ) from None
    from detrelay.apps.demo_page import launch

    launch(make_demo(arguments), host=arguments.host, port=arguments.port)
    return 0


def make_demo(arguments: Arguments) -> Demo:
    """The model, its assigners and its images.

    Raises:
        ValueError: one of them cannot be used.
    """
    from detrelay.apps.build import load_saved
    from detrelay.apps.demo_page import Demo
    from detrelay.apps.detector import place_model
    from detrelay.apps.evaluate import known_categories
    from detrelay.assigners import build_assigners
    from detrelay.core.data.coco import AnnotatedImages
    from detrelay.core.data.places import evaluation_split

    samples, classes = None, None
    if arguments.data is not None:
        samples = AnnotatedImages(evaluation_split(str(arguments.data), arguments.images))
    model, processor = load_saved(arguments.model, arguments.head)
    if samples is not None and arguments.data is not None:
        ids = known_categories(model, samples, data=arguments.data, source=arguments.model)
        classes = [ids.index(category.id) for category in samples.categories]
    own, learned = (
        build_assigners(name, model.loss_config)["decoder"]
        for name in ("hungarian", arguments.assigner)
    )
    return Demo(
        title=str(arguments.model),
        model=place_model(model, arguments.device, None),
        processor=processor,
        assigners=(own, learned),
        samples=samples,
        classes=classes,
    )


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: demo(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
