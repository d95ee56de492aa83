"""The program `detrelay`: one command per runnable module of `detrelay.apps`."""

from __future__ import annotations

import importlib
import sys

from detrelay.apps.console import USER_ERROR, run
from detrelay.core.errors import unknown_name

COMMANDS = {
    "train": "train a detector",
    "evaluate": "COCO figures of a saved model, or of detections on disk",
    "report": "what happens between the stages of a saved model, as a page of charts",
    "study": "train a grid of settings and seeds, and compare them with intervals",
    "cost": "parameters, arithmetic by part, time and memory of each setting of a study",
    "compare": "compare runs that exist: means, intervals and differences",
    "predict": "detect objects in images, draw them, write them to files",
    "demo": "serve a page for trying out a saved model, stage by stage",
    "convert": "convert a released checkpoint to a model folder",
    "export": "write a saved model for onnxruntime, OpenVINO or torch.export, and measure it",
    "check-data": "count, check, draw and convert annotated images",
    "publish": "publish a saved model on the Hugging Face Hub",
    "replay": "repeat a training step with a non-finite value",
}


def main() -> None:
    """Run the command named first with the other arguments."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
    elif name in COMMANDS:
        sys.argv = [f"detrelay {name}", *rest]
        run(lambda: importlib.import_module(f"detrelay.apps.{name.replace('-', '_')}").main())
    else:
        print(f"error: {unknown_name('command', name, COMMANDS)}", file=sys.stderr)
        sys.exit(USER_ERROR)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    return f"usage: detrelay COMMAND [options]\n\n{listed}\n\nFor details: detrelay COMMAND --help"


if __name__ == "__main__":
    main()
