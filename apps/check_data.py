"""Entry point of `detrelay check-data`, for `python apps/check_data.py`."""

import sys
from pathlib import Path

# or scripts in this folder would shadow packages of the same name, such as evaluate
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

from detrelay.apps.check_data import main  # noqa: E402

if __name__ == "__main__":
    main()
