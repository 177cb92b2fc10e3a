"""Makes `tests/models/helpers` importable: pytest's importlib mode puts no test directory on the path."""

import sys
from pathlib import Path

HELPERS = str(Path(__file__).parent / "helpers")
if HELPERS not in sys.path:
    sys.path.insert(0, HELPERS)
