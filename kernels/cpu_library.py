"""The C++ library of `csrc/cpu`: loading it, settings, and matrices packed for it.

Its functions take tensors, whose dtype, device, shape and contiguity C++ checks (csrc/cpu/tensors.h). Packed weights are
the exception: a list of integers, some of them addresses, says where they lie.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels.processors import usable_processors
from cai_runtime.kernels.weights import Core

STORE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # csrc/cpu/kernels.h: Store
INT4_CODE, QUADS_CODE = 4, 5
BLOCK_ROWS = 4
BLOCK_COLS = 16
LANE_ROWS = 16  # of int4 and quads
INT4_COLS = 32


@functools.cache
def library() -> Any:
    """The loaded library. Raises KernelError when it was not built."""
    path = importlib.resources.files("cai_runtime") / "_lib" / "libcai_cpu.so"
    if not path.is_file():
        raise KernelError(
            f"the CPU kernels are not built ({path} is missing): run `pip install -e .` in the repository"
        )
    import tvm_ffi

    lib = tvm_ffi.load_module(str(path))
    threads = os.environ.get("CAI_NUM_THREADS")
    lib["set_threads"](_positive(threads) if threads else usable_processors())
    isa = os.environ.get("CAI_CPU_ISA")
    if isa:
        use_instruction_set(isa, lib)
    return lib


def _positive(text: str) -> int:
    try:
        n = int(text)
    except ValueError:
        n = 0
    if n < 1:
        raise KernelError(f"CAI_NUM_THREADS must be a whole number above 0, not {text!r}")
    return n


@functools.cache
def function(name: str) -> Any:
    return library()[name]


@functools.cache
def operation(name: str) -> Callable[..., Any]:
    """A function of the library whose refusals are KernelErrors."""
    return guarded(function(name))


def guarded(native: Callable[..., Any]) -> Callable[..., Any]:
    """`native`, with the exceptions that C++ and the passing of tensors raise as KernelError."""

    def call(*arguments: Any) -> Any:
        try:
            return native(*arguments)
        except (IndexError, TypeError, ValueError, RuntimeError) as e:
            raise KernelError(str(e).partition("\n")[0]) from None

    return call


def empty(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[rows, columns] on the CPU, whatever torch's default dtype and device are."""
    return torch.empty(rows, columns, dtype=dtype, device="cpu")


def integers(numbers: Sequence[int]) -> torch.Tensor:
    """int64 [len(numbers)] on the CPU, whatever torch's default device is: a descriptor that C++ reads."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def available() -> bool:
    """Whether the library is there and loads."""
    try:
        library()
    except (KernelError, OSError, ImportError):
        return False
    return True


def instruction_set() -> str:
    return str(function("instruction_set")())


def instruction_sets() -> list[str]:
    """Those that this processor can run, best first."""
    return str(function("instruction_sets")()).split(",")


def prefers_int8() -> bool:
    """Whether int8 weights are multiplied faster with int8 activations than with fp32 ones: where an instruction sums four
    products of bytes (VNNI)."""
    return instruction_set() == "avx512"


def use_instruction_set(name: str, lib: Any = None) -> None:
    """Process-wide; for tests and measurements (or `CAI_CPU_ISA`)."""
    try:
        (lib or library())["use_instruction_set"](name)
    except ValueError as e:
        raise KernelError(str(e)) from None


def num_threads() -> int:
    return int(function("threads")())


def set_num_threads(n: int) -> None:
    """Threads that the CPU kernels use, process-wide. Default: the processors that this process may use, see
    `processors.usable_processors`, or `CAI_NUM_THREADS`."""
    if n < 1:
        raise KernelError(f"the number of threads must be above 0, not {n}")
    function("set_threads")(n)


def system_memory(nbytes: int) -> mmap.mmap:
    """Zeros straight from the operating system, committed as they are written: in huge pages where it has them."""
    size = max(4096, _round_up(nbytes, 4096))
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    # Private: shared memory, which is mmap's default, has huge pages only where a system is told so.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class ResultMemory:
    """Memory for large results, used again once no tensor lies over it any more: a system zeroes the pages that it gives,
    which for the logits of 64 rows took a tenth of a step."""

    LARGE = 1 << 20  # bytes, from which on allocators ask the system each time
    KEPT = 2  # results that are done with, at most: one is computed while another is read

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def empty(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[rows, columns] on the CPU, of any content."""
        nbytes = rows * columns * dtype.itemsize
        if nbytes < self.LARGE:
            return empty(rows, columns, dtype)
        memory = self._take(nbytes)
        view = memoryview(memory)  # the tensor's storage holds it, and so does every tensor that shares that
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=rows * columns).view(rows, columns)

    def _take(self, nbytes: int) -> mmap.mmap:
        while self._free:
            memory = self._free.pop()
            del self._free[self.KEPT - 1 :]
            if len(memory) >= nbytes:
                return memory
        return system_memory(nbytes)


class Arena:
    """Memory for packed weights straight from the operating system: huge pages where they can be had, and given back as
    a whole when the last tensor in it is gone."""

    def __init__(self, chunk_bytes: int = 64 << 20):
        self.chunk_bytes = chunk_bytes
        self._map: mmap.mmap | None = None
        self._used = 0

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor of zeros, 64-byte aligned."""
        start = (self._used + 63) // 64 * 64
        if self._map is None or start + nbytes > len(self._map):
            self._map = system_memory(max(self.chunk_bytes, nbytes))
            start = 0
        self._used = start + nbytes
        return torch.frombuffer(self._map, dtype=torch.uint8, offset=start, count=nbytes)


def _heap(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device="cpu")


class PackedMatrix:
    """A core in the layout of csrc/cpu/kernels.h, copied: blocks of rows, each a stream of whole cache lines.

    `fields` are the seven integers that C++ reads, `tensors` what they point to. codes: lay an int8 core out for int8
    activations of so many codes an element, 1 or 2; 0: for fp32 ones. Raises KernelError for a core that the CPU backend
    can't take.
    """

    def __init__(self, core: Core, arena: Arena | None = None, *, codes: int = 0):
        self._allocate = arena.allocate if arena is not None else _heap
        self.rows, self.cols = core.shape
        self.tensors: list[torch.Tensor] = []
        if core.data.device.type != "cpu":
            raise KernelError(f"the CPU backend packs tensors on the CPU, not on {core.data.device}")
        if core.is_int4:
            self.fields = self._pack_int4(core)
        else:
            self.fields = self._pack(core, codes if core.data.dtype == torch.int8 else 0)

    def _pack(self, core: Core, codes: int) -> list[int]:
        data = core.data
        if data.dtype not in STORE_CODES:
            raise KernelError(f"the CPU backend packs fp32, bf16, fp16, int8 and int4, not {data.dtype}")
        if (data.dtype == torch.int8) != (core.scale is not None):
            raise KernelError("an int8 core needs a scale, and only an int8 core takes one")
        data = data.contiguous()
        padded = _round_up(self.rows, LANE_ROWS if codes else BLOCK_ROWS) * _round_up(self.cols, BLOCK_COLS)
        packed = self._new(padded * data.element_size(), torch.uint8)
        operation("pack_quads" if codes else "pack")(data, packed)
        scale = 0
        if core.scale is not None:
            scale = self._copy(core.scale.to(torch.float32))
        store = QUADS_CODE if codes else STORE_CODES[data.dtype]
        return [packed.data_ptr(), scale, store, self.rows, self.cols, 0, codes]

    def _pack_int4(self, core: Core) -> list[int]:
        assert core.scale is not None
        data = core.data.contiguous()
        packed = self._new(_round_up(self.rows, LANE_ROWS) * _round_up(self.cols, INT4_COLS) // 2, torch.uint8)
        operation("pack_int4")(data, self.cols, packed)
        scale = self._copy(_blocked(core.scale))
        zero = 0 if core.zero is None else self._copy(_blocked(core.zero))
        return [packed.data_ptr(), scale, INT4_CODE, self.rows, self.cols, zero, core.group]

    def _new(self, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        t = self._allocate(_round_up(max(1, nbytes), 16)).view(dtype)
        self.tensors.append(t)
        return t

    def _copy(self, source: torch.Tensor) -> int:
        t = self._new(source.nbytes, source.dtype)
        t[: source.numel()] = source.reshape(-1)
        return t.data_ptr()


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _blocked(groups: torch.Tensor) -> torch.Tensor:
    """[rows, groups] as [ceil(rows/16), groups, 16], padded with zeros: what a block of int4 rows needs lies together."""
    rows, count = groups.shape
    padded = groups.new_zeros(_round_up(rows, LANE_ROWS), count)
    padded[:rows] = groups
    return padded.view(-1, LANE_ROWS, count).transpose(1, 2).contiguous()


EMPTY_MATRIX = [0] * 7


def check_rows(x: torch.Tensor, cols: int, what: str) -> torch.Tensor:
    """x [M, cols] fp32 on the CPU with contiguous rows; a copy where the rows are not contiguous."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise KernelError(f"{what}: the CPU kernels take fp32 activations on the CPU, not {x.dtype} on {x.device}")
    if x.dim() != 2 or x.shape[1] != cols:
        raise KernelError(f"{what}: expected [rows, {cols}], got {list(x.shape)}")
    return x if x.stride(1) == 1 or cols <= 1 else x.contiguous()
