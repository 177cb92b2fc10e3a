"""Descriptors of packed weights without their addresses, so that a program that holds the weights as tensors can be copied,
written to a file and read back in another process.

The CPU kernels are told where everything is by a list of integers, some of them addresses. Here each address is replaced by
the number of the tensor that it points to, and put back from wherever that tensor lies later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cai_runtime.errors import KernelError


def strip_addresses(fields: Sequence[int], tensors: Sequence[torch.Tensor]) -> list[int]:
    """`fields` as numbers that mean the same in every process.

    tensors: contiguous; whatever the addresses among the fields are the first bytes of. Returns [fields, tensors, the
    fields with 0 for addresses, each tensor's bytes, and (field, tensor) for each address]. Other fields are sizes and
    codes, which no address is as small as.
    """
    number_of = {t.data_ptr(): i for i, t in enumerate(tensors) if t.numel()}
    places = [(i, number_of[value]) for i, value in enumerate(fields) if value in number_of]
    kept = [0 if value in number_of else value for value in fields]
    return [len(fields), len(tensors), *kept, *(t.nbytes for t in tensors), *(n for place in places for n in place)]


def with_addresses(numbers: Sequence[int], tensors: Sequence[torch.Tensor]) -> list[int]:
    """What `strip_addresses` was given, for the places where the tensors lie now.

    Raises KernelError where a tensor is not what was stripped: moved off the CPU, of another size, or strided.
    """
    count, expected = numbers[0], numbers[1]
    fields = list(numbers[2 : 2 + count])
    sizes = numbers[2 + count : 2 + count + expected]
    places = numbers[2 + count + expected :]
    if len(tensors) != expected:
        raise KernelError(f"the packed weights are {expected} tensors, not {len(tensors)}")
    for i, (t, nbytes) in enumerate(zip(tensors, sizes, strict=True)):
        if t.device.type != "cpu" or t.nbytes != nbytes or not t.is_contiguous():
            raise KernelError(
                f"packed tensor {i} was {nbytes} contiguous bytes on the CPU and is now {t.dtype} {list(t.shape)} on "
                f"{t.device}: packed weights can't be moved or cast; prepare them again instead"
            )
    for field, tensor in zip(places[::2], places[1::2], strict=True):
        fields[field] = tensors[tensor].data_ptr()
    return fields
