"""The CPU library refuses every tensor of another dtype, device, size or layout, inputs and outputs alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import random_linear

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.convolution import CpuConvolution
from cai_runtime.kernels.cpu_library import PackedMatrix, integers
from cai_runtime.kernels.slim_linear import GELU_INPUT, LAYER_NORM, CpuLinear
from cai_runtime.kernels.weights import Core

KEEP: list[Any] = []  # what descriptors point to


def linear_arguments() -> list[Any]:
    g = torch.Generator().manual_seed(0)
    linear = CpuLinear([random_linear("lowrank", 20, 12, 6, ["int8", "fp32"], True, g)], int8_activations=True)
    KEEP.append(linear)
    x, residual, out = torch.ones(3, 20), torch.ones(3, 12), torch.ones(3, 12)
    scratch = torch.ones(3, linear.scratch_columns)
    return [linear.descriptor, x, LAYER_NORM, torch.ones(20), torch.ones(20), 1e-5, residual, out, scratch]


def convolution_arguments() -> list[Any]:
    convolution = CpuConvolution(torch.ones(5, 4, 3), torch.ones(5), 2, 6)
    KEEP.append(convolution)
    x, out, padded = torch.ones(12, 4), torch.ones(6, 5), torch.ones(2 * 8 * 4)
    return [convolution.linear.descriptor, x, GELU_INPUT, 6, 2, out, padded]


def gather_arguments() -> list[Any]:
    matrix = PackedMatrix(Core(torch.ones(5, 7)))
    KEEP.append(matrix)
    return [integers(matrix.fields), torch.zeros(3, dtype=torch.int32), torch.ones(3, 7)]


def attention_arguments() -> list[Any]:
    def ints(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    batch = (ints(0, 1, 0), ints(0, 1, 16), ints(0, 2, 3), ints(2, 1), ints(0, 1)[:, None])
    k, v = torch.zeros(2 * 1 * 4 * 16), torch.zeros(2 * 1 * 16 * 16)
    heads = integers([2, 1, 4, 16, 0])
    sinks, norms = torch.ones(2), torch.ones(2, 4)
    return [torch.ones(3, 16), *batch, torch.ones(8, 2), heads, 0.5, k, v, 2, sinks, norms, 1e-5, torch.ones(3, 8)]


def encoder_arguments() -> list[Any]:
    return [torch.ones(6, 16), 2, 1, 4, 3, 0.5, torch.ones(6, 8)]


def cross_cache() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """heads, keys and values of 3 pages."""
    return integers([2, 1, 4, 16, 0]), torch.zeros(3 * 1 * 4 * 16), torch.zeros(3 * 1 * 16 * 16)


def cross_arguments() -> list[Any]:
    starts, pages = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([[0, 2], [1, 2]], dtype=torch.int32)
    heads, k, v = cross_cache()
    return [torch.ones(3, 8), starts, pages, heads, 0.5, k, v, 3, 20, torch.ones(3, 8)]


def cross_write_arguments() -> list[Any]:
    heads, k, v = cross_cache()
    return [torch.ones(20, 8), torch.tensor([[0, 2]], dtype=torch.int32), heads, k, v, 3, 20]


def cross_weights_arguments() -> list[Any]:
    pages, which = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
    heads, k, v = cross_cache()
    return [torch.ones(3, 8), pages, which, heads, 0.5, k, v, 3, 20, torch.ones(6, 20)]


def norm_arguments() -> list[Any]:
    return [torch.ones(3, 8), torch.ones(3, 8), torch.ones(8), 1e-5, torch.ones(3, 8), torch.ones(3, 8)]


ARGUMENTS: dict[str, Callable[[], list[Any]]] = {
    "linear_group": linear_arguments,
    "rms_norm": norm_arguments,
    "layer_norm": lambda: [torch.ones(3, 8), torch.ones(8), torch.ones(8), 1e-5, torch.ones(3, 8)],
    "convolution": convolution_arguments,
    "gelu": lambda: [torch.ones(3, 8), torch.ones(3, 8)],
    "add_rows": lambda: [torch.ones(3, 8), torch.ones(5, 8), torch.ones(3, dtype=torch.int32), torch.ones(3, 8)],
    "swiglu": lambda: [torch.ones(3, 8), torch.ones(3, 4)],
    "gather": gather_arguments,
    "attention": attention_arguments,
    "encoder_attention": encoder_arguments,
    "cross_attention": cross_arguments,
    "cross_write": cross_write_arguments,
    "cross_weights": cross_weights_arguments,
    "pack_int4": lambda: [torch.ones(3, 4, dtype=torch.uint8), 8, torch.zeros(16 * 32 // 2, dtype=torch.uint8)],
}


def other_dtype(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t.to(torch.int16)


def half_the_bytes(t: torch.Tensor) -> torch.Tensor:
    """What `torch.empty` gave where the default dtype was bfloat16."""
    return t.to(torch.bfloat16) if t.is_floating_point() else t.to(torch.int8)


def strided(t: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(2, dim=-1)[..., ::2]


def shorter(t: torch.Tensor) -> torch.Tensor:
    return t[..., : t.shape[-1] // 2].contiguous()


WRONG = {
    "dtype": other_dtype,
    "half": half_the_bytes,
    "device": lambda t: t.to("meta"),
    "strides": strided,
    "size": shorter,
    "dimensions": lambda t: t.new_empty(0, 0, 0),
}
CASES = [
    (name, at, wrong)
    for name, make in ARGUMENTS.items()
    for at, argument in enumerate(make())
    if isinstance(argument, torch.Tensor)
    for wrong in WRONG
]


@pytest.mark.parametrize(("name", "at", "wrong"), CASES)
def test_a_wrong_tensor_is_refused(name: str, at: int, wrong: str):
    arguments = ARGUMENTS[name]()
    arguments[at] = WRONG[wrong](arguments[at])
    with pytest.raises(KernelError):
        cpu_library.operation(name)(*arguments)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_right_tensors_are_taken(name: str):
    cpu_library.operation(name)(*ARGUMENTS[name]())


def test_a_message_names_tensor_and_remedy():
    arguments = norm_arguments()
    arguments[-1] = arguments[-1].to(torch.bfloat16)
    expected = "out must be contiguous float32 [3, 8] on the CPU, not bfloat16 [3, 8]"
    with pytest.raises(KernelError, match=re.escape(expected)):
        cpu_library.operation("rms_norm")(*arguments)
