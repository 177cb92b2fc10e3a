"""What a compiled CUDA kernel is made of: its machine code, read from cuobjdump's listing.

Used by benchmarks/gpu_code.py and by tests/kernels/test_cuda_compile.py."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STORES = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "a": "int8"}
_FUNCTION = re.compile(r"\n\s+Function : (\S+)")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)([^;]*);")
_DECODE = re.compile(r"22decode_products_kernelI(?P<act>13__nv_bfloat16|6__half)(?P<store>.*?)Li(?P<halves>[12])EEEv")


_MANY = re.compile(
    r"20many_products_kernelI(?P<act>13__nv_bfloat16|6__half)(?P<store>.*?)Li(?P<rows>\d+)ELb(?P<split>[01])EEEv"
)


@dataclass(frozen=True)
class Instruction:
    address: int
    operation: str  # such as "HMMA.16816.F32.BF16"
    rest: str


@dataclass(frozen=True)
class Kernel:
    """A decode kernel. name: such as "bf16 x int4/128". rows: of x, at most. hot: of its instructions the loop that takes a
    full copy (two steps of 1 KiB of weights) at a time."""

    mangled: str
    name: str
    rows: int
    instructions: list[Instruction]
    hot: list[Instruction]

    @property
    def hot_per_kib(self) -> float:
        """Instructions of the loop for 1 KiB of weights; those of rarely taken branches in it count."""
        return len(self.hot) / 2

    def counts(self) -> Counter[str]:
        """Of the loop, by operation."""
        return Counter(i.operation.split(".")[0] for i in self.hot)


@dataclass(frozen=True)
class ManyKernel:
    """A kernel for many rows. rows: of x, that a block takes. split: eight blocks divide the columns. per_product:
    instructions for each product of a warp group, over a stage's products that lie closest together; None without any."""

    mangled: str
    name: str
    rows: int
    split: bool
    per_product: float | None


def disassembled(cubin: Path) -> str:
    """The listing of cuobjdump, which Triton's wheel carries."""
    import triton

    program = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([program, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout


def _functions(cubin: Path, pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], str, str, list[Instruction]]]:
    """Of every kernel whose mangled name matches: the match, a name such as "bf16 x int8", the mangled one, its code."""
    parts = _FUNCTION.split(disassembled(cubin))[1:]
    for mangled, listing in zip(parts[::2], parts[1::2], strict=True):
        match = pattern.search(mangled)
        if match is None:
            continue
        instructions = [Instruction(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(listing)]
        yield match, f"{STORES[match['act']]} x {_store(match['store'], match['act'])}", mangled, instructions


def decode_kernels(cubin: Path) -> list[Kernel]:
    """The decode kernels of a compiled linear_*.cu."""
    found = []
    for match, name, mangled, instructions in _functions(cubin, _DECODE):
        found.append(Kernel(mangled, name, 8 * int(match["halves"]), instructions, _hot_loop(instructions)))
    return found


def many_kernels(cubin: Path) -> list[ManyKernel]:
    """The kernels of a compiled many_*.cu."""
    found = []
    for match, name, mangled, instructions in _functions(cubin, _MANY):
        split = match["split"] == "1"
        count = 4 if split and "int4" not in name else 8
        at = [n for n, i in enumerate(instructions) if i.operation.startswith("HGMMA")]
        spans = [last - first for first, last in zip(at, at[count - 1 :], strict=False)]
        per_product = round(min(spans) / (count - 1), 1) if spans else None
        found.append(ManyKernel(mangled, name, int(match["rows"]), split, per_product))
    return found


def _store(mangled: str, activation: str) -> str:
    int4 = re.search(r"4Int4ILi(\d+)ELb([01])E", mangled)
    if int4 is not None:
        return f"int4/{int4[1]}" + (" with zero points" if int4[2] == "1" else "")
    return "int8" if mangled == "a" else STORES[activation]  # the activations' type again, or a back reference to it


def _hot_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The shortest loop that waits for a copy and multiplies."""
    place = {i.address: n for n, i in enumerate(instructions)}
    loops = []
    for end, i in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", i.rest) if i.operation.startswith("BRA") else None
        start = place.get(int(target[1], 16), end) if target is not None else end
        body = instructions[start : end + 1]
        operations = {b.operation.split(".")[0] for b in body}
        if start < end and {"SYNCS", "HMMA"} <= operations:
            loops.append(body)
    return min(loops, key=len)
