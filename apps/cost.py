"""Entry point of `detrelay cost`, for `python apps/cost.py`."""

import sys
from pathlib import Path

# or scripts in this folder would shadow packages of the same name, such as evaluate
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

from detrelay.apps.cost import main  # noqa: E402

if __name__ == "__main__":
    main()
