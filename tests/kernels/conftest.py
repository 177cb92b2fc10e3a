"""Makes `tests/kernels/helpers` importable: pytest's importlib mode puts no test directory on the path."""

from __future__ import annotations

import sys
from pathlib import Path

HELPERS = str(Path(__file__).parent / "helpers")
if HELPERS not in sys.path:
    sys.path.append(HELPERS)
