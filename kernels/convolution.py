"""Convolution over time with three taps. On the CPU a linear over rows that overlap: x is copied once for the padding, not
for each tap."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.activation import gelu_reference
from cai_runtime.kernels.cpu_library import Arena, check_rows
from cai_runtime.kernels.program import NotRecordable, Value
from cai_runtime.kernels.slim_linear import GELU_INPUT, NO_PROLOGUE, CpuLinear, as_dense
from cai_runtime.kernels.weights import Core

TAPS = 3


def convolution_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int, rows: int
) -> torch.Tensor:
    """x [n * rows, in], windows of `rows` rows -> [n * rows / stride, out], as Conv1d with padding 1 on each window.

    weight [out, in, 3], whose tap 1 meets the row itself; bias [out]. In x's dtype.
    """
    windows = x.reshape(-1, rows, x.shape[1]).transpose(1, 2)
    y = torch.nn.functional.conv1d(windows, weight.to(x.dtype), bias.to(x.dtype), stride=stride, padding=1)
    return y.transpose(1, 2).reshape(-1, weight.shape[0])


class Convolution(ABC):
    """A convolution made ready for one backend. Several rows of x may lie side by side as one: x [n * rows / f, f * in] for
    a whole f gives [n * rows / f, f * out / stride] where stride divides f, else [n * rows / stride, out] for f = 1.

    weight [out, in, 3] in any float dtype, bias [out]. rows: of one window, a multiple of the stride; a row of zeros goes
    before and behind each window. Raises KernelError for other shapes. A recorded pass keeps the rows of its values, so
    there the stride divides f.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, stride: int, rows: int):
        if weight.dim() != 3 or weight.shape[2] != TAPS or tuple(bias.shape) != (weight.shape[0],):
            raise KernelError(
                f"a convolution has a weight [out, in, {TAPS}] and a bias [out], not {list(weight.shape)} and "
                f"{list(bias.shape)}"
            )
        if stride < 1 or rows < 1 or rows % stride:
            raise KernelError(f"a convolution's window of {rows} rows is no multiple of its stride {stride}")
        self.out_features, self.in_features = weight.shape[:2]
        self.stride, self.rows = stride, rows

    def __call__(self, x: Any, *, gelu: bool = False) -> Any:
        """gelu: apply GELU to x first. On the CPU, x may be a Value of a recorded pass. Raises KernelError for an x that
        does not fit."""
        width = x.width if isinstance(x, Value) else x.shape[1] if x.dim() == 2 else 0
        side = width // self.in_features if width % self.in_features == 0 else 0
        if side == 0 or self.rows % side or (side > 1 and side % self.stride):
            raise KernelError(
                f"a convolution over {self.in_features} columns with stride {self.stride} can't take rows of {width}"
            )
        if isinstance(x, Value):
            return self._note(x, side, gelu)
        if x.shape[0] * side % self.rows:
            raise KernelError(f"a convolution takes windows of {self.rows} rows, not {x.shape[0] * side} rows")
        y = self._run(x.reshape(-1, self.in_features), gelu)
        return y.reshape(-1, self.out_features * max(1, side // self.stride))

    @abstractmethod
    def _run(self, x: torch.Tensor, gelu: bool) -> torch.Tensor:
        """x [n * rows, in] -> [n * rows / stride, out]."""

    def _note(self, x: Value, side: int, gelu: bool) -> Value:
        raise NotRecordable("this backend records nothing")


class TorchConvolution(Convolution):
    """By torch's function, on any device. gelu_op: the backend's."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        stride: int,
        rows: int,
        gelu_op: Callable[[torch.Tensor], torch.Tensor] = gelu_reference,
    ):
        super().__init__(weight, bias, stride, rows)
        self._weight, self._bias, self._gelu = weight, bias, gelu_op

    def _run(self, x: torch.Tensor, gelu: bool) -> torch.Tensor:
        return convolution_reference(self._gelu(x) if gelu else x, self._weight, self._bias, self.stride, self.rows)


class CpuConvolution(Convolution):
    """By the C++ kernels: a linear of 3 * in features. The weights are copied into `arena` (or the heap)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, stride: int, rows: int, arena: Arena | None = None):
        super().__init__(weight, bias, stride, rows)
        matrix = weight.transpose(1, 2).reshape(self.out_features, TAPS * self.in_features)
        self.linear = CpuLinear([as_dense(Core(matrix), bias)], arena)
        self._native = cpu_library.operation("convolution")

    def _run(self, x: torch.Tensor, gelu: bool) -> torch.Tensor:
        x = check_rows(x, self.in_features, "convolution")
        out = cpu_library.empty(x.shape[0] // self.stride, self.out_features)
        padded = cpu_library.empty(x.shape[0] // self.rows * (self.rows + 2), self.in_features)
        code = GELU_INPUT if gelu else NO_PROLOGUE
        self._native(self.linear.descriptor, x.contiguous(), code, self.rows, self.stride, out, padded.view(-1))
        return out

    def _note(self, x: Value, side: int, gelu: bool) -> Value:
        if side % self.stride:
            raise KernelError(f"a recorded convolution with stride {self.stride} takes as many rows side by side")
        attributes = {"prologue": GELU_INPUT if gelu else NO_PROLOGUE, "window": self.rows, "stride": self.stride}
        return x.recorder.note(
            "convolution", [x], side // self.stride * self.out_features,
            attributes=attributes, bindings={"group": self.linear.descriptor}, keep=self,
        )  # fmt: skip
