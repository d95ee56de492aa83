"""Entry point of `detrelay demo`, for `python apps/demo.py` and `accelerate launch`."""

import sys
from pathlib import Path

# or scripts in this folder would shadow packages of the same name, such as evaluate
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

from detrelay.apps.demo import main  # noqa: E402

if __name__ == "__main__":
    main()
