"""Makes `tests/kernels/helpers` and the package `tests/kernels/ptx` importable, as pytest's importlib mode puts no test
directory on the path, and holds what the tests of the Triton kernels share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HELPERS = str(Path(__file__).parent / "helpers")
HERE = str(Path(__file__).parent)  # of the package `ptx`
for folder in (HELPERS, HERE):
    if folder not in sys.path:
        sys.path.append(folder)


@pytest.fixture
def ordered_sums(monkeypatch: pytest.MonkeyPatch):
    """The interpreter multiplies matrices with a BLAS, whose order of sums depends on the shape; here it is that of a chain
    over the inner dimension, as in a chain of matrix instructions. A GPU is left alone."""
    import torch

    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.copy()
        for k in range(a.data.shape[-1]):
            total += a.data[:, k, None].astype(total.dtype) * b.data[None, k, :].astype(total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
