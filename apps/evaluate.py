"""Entry point of `detrelay evaluate`, for `python apps/evaluate.py` and `accelerate launch`."""

import sys
from pathlib import Path

# or scripts in this folder would shadow packages of the same name, such as evaluate
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

from detrelay.apps.evaluate import main  # noqa: E402

if __name__ == "__main__":
    main()
