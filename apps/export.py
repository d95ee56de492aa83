"""The door to `detrelay export`, for `python apps/export.py`."""

import sys
from pathlib import Path

# or the scripts beside this one would stand in for packages of their names, such as evaluate
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

from detrelay.apps.export import main  # noqa: E402

if __name__ == "__main__":
    main()
