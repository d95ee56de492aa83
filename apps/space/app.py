"""The page of `detrelay demo` in a container: on one's own machine, or as a Space of the Hub."""

import os
import sys
from pathlib import Path

from detrelay.apps.demo import main

HERE = Path(__file__).parent
BESIDE = HERE / "model"


def arguments() -> list[str]:
    """What `detrelay demo` is called with: the variable MODEL, else the folder `model` beside."""
    model = os.environ.get("MODEL") or (str(BESIDE) if BESIDE.is_dir() else None)
    if model is None:
        sys.exit(f"error: set the variable MODEL to a model on the Hub, or put one into {BESIDE}")
    return [model, "--host", "0.0.0.0", "--port", os.environ.get("PORT", "7860")]


if __name__ == "__main__":
    sys.argv[1:] = arguments()
    main()
