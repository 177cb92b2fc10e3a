"""Where Triton's interpreter can run our kernels."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import numpy as np
import pytest
from packaging.version import Version

HAS_TRITON = importlib.util.find_spec("triton") is not None

# The interpreter of Triton before 3.7 takes int() of an array for a loop's bound, which NumPy refuses since 2.4.
# Compiled kernels are not concerned.
_CANNOT_COUNT = HAS_TRITON and Version(version("triton")) < Version("3.7") and Version(np.__version__) >= Version("2.4")


def needs_interpreter(test):
    """A mark for tests that start a process in which Triton interprets."""
    test = pytest.mark.skipif(_CANNOT_COUNT, reason="the interpreter of Triton < 3.7 needs NumPy < 2.4")(test)
    return pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")(test)
