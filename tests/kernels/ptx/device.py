"""Launches of Triton kernels on CPU tensors: compiled for a GPU that need not be there, and executed by the machine."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cai_runtime.kernels.triton import attention, dependent, plan
from ptx.machine import run
from ptx.memory import Global

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64", torch.float64: "*fp64",
}  # fmt: skip


class Device:
    """What takes the place of `JITFunction.run`: specializes a kernel as Triton does for a launch, and executes it.

    launches: the PTX of each launch so far, with its kernel's name.
    """

    def __init__(self, capability: int = 90):
        self.launches: list[tuple[str, str]] = []
        self._target = GPUTarget("cuda", capability, 32)
        self._compiled: dict[Any, Any] = {}

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        names = [p.name for p in kernel.params]
        bound = dict(zip(names, args, strict=False)) | {name: kwargs.pop(name) for name in names if name in kwargs}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned: dict[tuple[int], list[list[Any]]] = {}
        for i, p in enumerate(kernel.params):
            value = bound[p.name]
            kind = "constexpr" if p.is_constexpr else _kind(value, p.do_not_specialize)
            signature[p.name] = kind
            if kind == "constexpr":
                constants[p.name] = value
            elif _aligned(value) and (isinstance(value, torch.Tensor) or not p.do_not_specialize):
                aligned[(i,)] = [["tt.divisibility", 16]]
        values = [bound[name] for name in names if signature[name] != "constexpr"]
        key = (kernel, *signature.items(), *(str(c) for c in constants.values()), *aligned, *kwargs.items())
        if key not in self._compiled:
            source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
            self._compiled[key] = triton.compile(source, target=self._target, options=kwargs)
        compiled = self._compiled[key]
        self.launches.append((kernel.__name__, compiled.asm["ptx"]))
        _execute(compiled.asm["ptx"], values, (*grid, 1, 1)[:3], compiled.metadata.shared)


def _kind(value: Any, unspecialized: bool) -> str:
    """What Triton compiles an argument as."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if value is None or (isinstance(value, int) and value == 1 and not unspecialized):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _aligned(value: Any) -> bool:
    """Whether Triton compiles for a multiple of 16, of an address or an integer."""
    number = value.data_ptr() if isinstance(value, torch.Tensor) else value
    return isinstance(number, int) and number % 16 == 0


def _execute(ptx: str, values: list[Any], grid: tuple[int, int, int], shared_bytes: int) -> None:
    """With copies of the tensors' storages, brought back afterwards."""
    storages = {v.untyped_storage().data_ptr(): _bytes(v) for v in values if isinstance(v, torch.Tensor)}
    memory = Global(sum(len(s) + 1024 for s in storages.values()) + 4096)
    starts = {at: memory.allocate(content, at % 128) for at, content in storages.items()}
    parameters = [
        starts[v.untyped_storage().data_ptr()] + v.storage_offset() * v.element_size()
        if isinstance(v, torch.Tensor)
        else int(np.float32(v).view(np.uint32)) if isinstance(v, float) else v & (1 << 64) - 1
        for v in values
    ]  # fmt: skip
    run(ptx, memory, [*parameters, 0, 0], grid, shared_bytes)  # two more: scratch memory that these kernels don't use
    for at, content in storages.items():
        content[:] = memory.at(starts[at], len(content))


def _bytes(t: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy()


@functools.cache
def device(capability: int) -> Device:
    """One for all tests, so that a kernel is compiled once."""
    return Device(capability)


def put_in_place(monkeypatch: Any, capability: int = 90) -> Device:
    """Until the test ends, every launch goes to the machine."""
    there = device(capability)
    there.launches.clear()

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        there.launch(kernel, *args, **kwargs)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", launch)
    for module in (dependent, plan):
        monkeypatch.setattr(module, "launches_dependently", lambda device: capability >= 90)
    monkeypatch.setattr(attention, "is_hopper", lambda device: capability == 90)
    return there
