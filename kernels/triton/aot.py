"""Compiles every Triton kernel ahead of time for GPUs that need not be there, and checks what came out.

    python -m cai_runtime.kernels.triton.aot [--targets sm_90,gfx942]

For each kernel and target it prints registers, spills and shared memory, and fails when a decode kernel spills, when
shared memory exceeds what the architecture has, or when the matrix products are not the one instruction shape that batch
invariance rests on (m16n8k16 on NVIDIA; wgmma and tcgen05 round differently; 16x16 on AMD).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cai_runtime.kernels.triton.attention import attention_tile, paged_attention_kernel
from cai_runtime.kernels.triton.launch import compile_options, interpreting, operand_dtype
from cai_runtime.kernels.triton.linear import TO_BOTH, TO_Y, TO_Z, compute_dtype, products_kernel, tile_for
from cai_runtime.kernels.triton.rope import rope_kv_write_kernel
from cai_runtime.kernels.triton.rows import rms_norm_kernel, swiglu_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

_POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}


@dataclass(frozen=True)
class Case:
    """One specialization of a kernel, as a launch on a real model would make it.

    `types`: argument -> "*bf16", "i32", "fp32"; a trailing "!" says that the value is a multiple of 16 (pointers: that
    it is so aligned). `constants`: the rest.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    decode: bool = False  # bound by memory latency: a spill is an error
    products: bool = True  # has matrix products
    max_registers: int | None = None
    fp32: bool = False  # in float32: fused multiply-adds on NVIDIA


@dataclass
class Outcome:
    registers: int
    spilled: int  # bytes of local memory a thread (NVIDIA), registers (AMD)
    shared: int  # bytes
    problems: list[str] = field(default_factory=list)


def _linear_case(activation: torch.dtype, store: torch.dtype, rows: int, to: tuple[int, ...]) -> Case:
    compute = compute_dtype(activation, store)
    tile = tile_for(rows, compute)
    x = _POINTER[activation] + "!"
    types = {"x": x, "y": x, "M": "i32", **dict.fromkeys(("ldx", "ldz", "ldy"), "i32!")}
    types["z"] = x
    constants: dict[str, Any] = {"residual": None, "ldr": 0, "COMPUTE": operand_dtype(compute)}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    for g in range(3):
        fields = ("w", "scale", "index", "bias", "N", "K", "ldw", "x_col", "z_col", "y_col")
        w, scale, index, bias, *numbers = (f"{name}{g}" for name in fields)
        constants[f"TO_{g}"] = to[g] if g < len(to) else 0
        constants[bias] = None
        if g >= len(to):
            constants |= dict.fromkeys((w, scale, index)) | dict.fromkeys(numbers, 0)
            continue
        types[w] = _POINTER[store] + "!"
        types |= dict.fromkeys(numbers, "i32!")
        if store == torch.int8:
            types[scale] = "*fp32!"
        else:
            constants[scale] = None
        if to[g] == TO_Z:
            constants[index] = None
        else:
            types[index] = "*i32"  # the second part of a pivot starts anywhere
    decode = rows <= 16
    name = f"products {'decode' if decode else 'prefill'} x{len(to)} {activation} {store}".replace("torch.", "")
    fp32 = compute == torch.float32
    return Case(name, products_kernel, types, constants, tile.num_warps, tile.num_stages, decode, fp32=fp32)


def _attention_case(dtype: torch.dtype, dim: int, group: int, tokens: int) -> Case:
    t = _POINTER[dtype] + "!"
    types = dict.fromkeys(("q", "k_cache", "v_cache", "out"), t)
    types |= dict.fromkeys(("query_start", "context_len", "page_table"), "*i32!")
    types |= {"sequences": "i32", "scale_log2": "fp32", "ldt": "i32"}
    strides = ("ldq", "q_head", "ldo", "k_page", "k_head", "k_slot", "v_page", "v_head", "v_slot")
    types |= dict.fromkeys(strides, "i32!")
    decode = tokens == 1
    tile = attention_tile(group, dim, dtype, decode=decode)
    constants = {
        "GROUP": group, "HEADS": tile.heads, "DIM": dim, "PAGE": 16, "COMPUTE": operand_dtype(dtype),
        "TOKENS": tile.tokens, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "BLOCK_D": max(16, triton.next_power_of_2(dim)),
    }  # fmt: skip
    name = f"attention {'decode' if decode else 'prefill'} {dtype} D={dim}".replace("torch.", "")
    fp32 = dtype == torch.float32
    return Case(
        name,
        paged_attention_kernel,
        types,
        constants,
        tile.num_warps,
        2,
        decode,
        fp32=fp32,
        max_registers=tile.max_registers,
    )


def cases() -> Iterator[Case]:
    """The specializations that a bf16 or int8 model's decode and prefill launch, and fp32's."""
    bf16, fp32, int8 = torch.bfloat16, torch.float32, torch.int8
    for store in (bf16, int8):
        yield _linear_case(bf16, store, 1, (TO_BOTH, TO_BOTH, TO_BOTH))
        yield _linear_case(bf16, store, 512, (TO_Y,))
    yield _linear_case(fp32, int8, 1, (TO_BOTH,))
    yield _linear_case(fp32, fp32, 512, (TO_Z,))
    yield _attention_case(bf16, 128, 4, 1)
    yield _attention_case(bf16, 128, 4, 512)
    yield _attention_case(fp32, 64, 3, 1)
    b = "*bf16!"
    types = {"x": b, "residual": b, "weight": b, "normed": b, "total": b, "eps": "fp32"}
    types |= dict.fromkeys(("width", "ldx", "ldr", "ldn", "ldt"), "i32!")
    blocks = {"BLOCK": 4096, "ONE_BLOCK": True}
    yield Case("add_rms_norm 4096", rms_norm_kernel, types, blocks, 8, decode=True, products=False)
    types = {"gate_up": b, "out": b} | dict.fromkeys(("width", "ldg", "ldo"), "i32!")
    yield Case("swiglu", swiglu_kernel, types, {"BLOCK": 1024}, 4, decode=True, products=False)
    types = {"qkv": b, "cos_sin": "*fp32!", "k_cache": b, "v_cache": b, "positions": "*i32!", "slots": "*i32!"}
    numbers = ("ldq", "ldc", "page_size", "k_page", "k_head", "k_slot", "v_page", "v_head", "v_slot")
    types |= dict.fromkeys(numbers, "i32!")
    heads = {"Q_HEADS": 32, "KV_HEADS": 8, "DIM": 128, "BLOCK": 64}
    yield Case("rope_kv_write", rope_kv_write_kernel, types, heads, 1, decode=True, products=False)


def compile_case(case: Case, target_name: str) -> Outcome:
    """Compile one case for one target and read the result. Raises what the compiler raises."""
    target = TARGETS[target_name]
    names = case.kernel.arg_names
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        kind = case.types.get(name, "constexpr")
        signature[name] = kind.rstrip("!")
        if kind.endswith("!"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=attributes)
    options = compile_options(
        case.num_warps, case.num_stages, max_registers=case.max_registers, hip=target.backend == "hip"
    )
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        outcome = _read_amd(case, compiled)
    else:
        outcome = _read_nvidia(case, compiled)
    if outcome.spilled and case.decode:
        outcome.problems.append(f"a decode kernel spills ({outcome.spilled})")
    if outcome.shared > SHARED_BYTES[target_name]:
        limit = SHARED_BYTES[target_name]
        outcome.problems.append(f"{outcome.shared} bytes of shared memory, {target_name} has {limit}")
    return outcome


def _read_nvidia(case: Case, compiled: Any) -> Outcome:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    outcome = Outcome(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)
    ptx = compiled.asm["ptx"]
    if "wgmma" in ptx or "tcgen05" in ptx:
        outcome.problems.append("uses wgmma or tcgen05: sums depend on the number of rows")
    if case.products:
        shapes = set(re.findall(r"mma\.sync\.aligned\.(m\d+n\d+k\d+)", ptx))
        wanted = set() if case.fp32 else {"m16n8k16"}
        if shapes != wanted:
            outcome.problems.append(f"matrix instructions {sorted(shapes)}, expected {sorted(wanted)}")
    return outcome


def _read_amd(case: Case, compiled: Any) -> Outcome:
    text = compiled.asm["amdgcn"]
    registers, spilled = (
        int(found.group(1)) if (found := re.search(rf"\.{name}:\s+(\d+)", text)) else -1
        for name in ("vgpr_count", "vgpr_spill_count")
    )
    outcome = Outcome(registers, spilled, compiled.metadata.shared)
    shapes = set(re.findall(r"v_mfma_\w+?_(\d+x\d+)x", text))
    if case.products and shapes != {"16x16"}:
        outcome.problems.append(f"matrix instructions {sorted(shapes)}, expected 16x16 alone")
    return outcome


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time and check the result.")
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"comma list of {', '.join(TARGETS)}")
    args = parser.parse_args(argv)
    targets = [t for t in args.targets.split(",") if t]
    unknown = [t for t in targets if t not in TARGETS]
    if unknown or not targets:
        parser.error(f"unknown target {', '.join(unknown) or '(none)'}; known: {', '.join(TARGETS)}")
    if interpreting():
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    failures = 0
    print(f"triton {triton.__version__}\n{'kernel':<44}{'target':<8}{'registers':>10}{'spilled':>9}{'shared':>9}")
    for case in cases():
        for target in targets:
            try:
                outcome = compile_case(case, target)
            except Exception as error:  # noqa: BLE001  # any compiler failure is a finding; the next case may pass
                failures += 1
                print(f"{case.name:<44}{target:<8}  does not compile: {type(error).__name__}: {error}", flush=True)
                continue
            failures += bool(outcome.problems)
            note = "".join(f"  FAIL: {p}" for p in outcome.problems)
            row = f"{outcome.registers:>10}{outcome.spilled:>9}{outcome.shared:>9}"
            print(f"{case.name:<44}{target:<8}{row}{note}", flush=True)
    print(f"{failures} failed" if failures else "all compiled as they should")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
