"""The specializations of the Triton kernels that models launch: what `aot.py` compiles and checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from cai_runtime.kernels.triton import products as p
from cai_runtime.kernels.triton.attention import attention_tile, merge_splits_kernel, paged_attention_kernel
from cai_runtime.kernels.triton.launch import operand_dtype
from cai_runtime.kernels.triton.linear import NORM_IN_LAUNCH
from cai_runtime.kernels.triton.logprobs import row_totals_kernel
from cai_runtime.kernels.triton.plan import MEMBERS, compute_dtype
from cai_runtime.kernels.triton.quantized_rows import quantize_rows_kernel
from cai_runtime.kernels.triton.rope import rope_kv_write_kernel
from cai_runtime.kernels.triton.rows import rms_norm_kernel, swiglu_kernel
from cai_runtime.kernels.triton.sampling import sample_kernel
from cai_runtime.kernels.triton.tiles import DECODE_ROWS, Products, block_k, default_tile
from cai_runtime.kernels.triton.weigh import BLOCK, OPTIONS

_POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}
_STORE = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "int8": "*i8", "int4": "*i32"}


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
    int8: bool = False  # sums of int8 products: exact, by any instruction
    wide_loads: bool = False  # most loads must be of 16 bytes (NVIDIA)
    same_bits: str = ""  # names what cases of the same name compute, bit for bit alike; "": no other case does
    fused: bool = True  # products and sums may be one instruction
    warp_groups: bool = False  # by Hopper's products of warp groups: compiled for it alone


def _linear_case(
    activation: torch.dtype,
    store: str,
    rows: int,
    to: tuple[int, ...],
    *,
    group: int = 0,
    zero: bool = False,
    prologue: int = p.PLAIN.value,
    int8_activations: bool = False,
) -> Case:
    compute = torch.int8 if int8_activations else compute_dtype(activation, store)
    decode = rows <= DECODE_ROWS
    tile = default_tile(Products(decode, compute, store, group, 4096, 4096, torch.device("cuda")))
    x = _POINTER[activation] + "!"
    types = {"x": "*i8!" if int8_activations else x, "y": x, "z": x, "M": "i32", "eps": "fp32"}
    types |= dict.fromkeys(("ldx", "ldz", "ldy"), "i32!")
    constants: dict[str, Any] = {"residual": None, "ldr": 0, "COMPUTE": operand_dtype(compute)}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": block_k(compute, group)}
    constants["PROLOGUE"] = prologue
    normed = {"gain": x if prologue in (p.NORM.value, p.FACTOR.value) else None}
    normed |= {"factor": "*fp32!" if prologue == p.FACTOR.value else None}
    normed |= {"x_scale": "*fp32!" if int8_activations else None}
    types |= {name: kind for name, kind in normed.items() if kind}
    constants |= {name: None for name, kind in normed.items() if not kind}
    for g in range(MEMBERS):
        w, scale, zeros, index, bias = (f"{name}{g}" for name in ("w", "scale", "zero", "index", "bias"))
        numbers = [f"{name}{g}" for name in ("N", "K", "groups", "x_col", "z_col", "y_col")]
        constants[f"TO_{g}"] = to[g] if g < len(to) else p.ABSENT
        constants[f"GROUP_{g}"] = group if g < len(to) else 0
        constants[bias] = None
        if g >= len(to):
            constants |= dict.fromkeys((w, scale, zeros, index)) | dict.fromkeys((*numbers, f"pitch{g}"), 0)
            continue
        types |= {w: _STORE[store] + "!", f"pitch{g}": "i32"} | dict.fromkeys(numbers, "i32!")
        optional = {scale: {"int8": "*fp32!", "int4": "*bf16!"}.get(store), zeros: "*bf16!" if zero else None}
        optional[index] = None if to[g] == p.TO_Z else "*i32"  # the second part of a pivot starts anywhere
        types |= {name: kind for name, kind in optional.items() if kind}
        constants |= {name: None for name, kind in optional.items() if not kind}
    names = {p.PLAIN.value: "", p.NORM.value: " norm", p.FACTOR.value: " factor"}
    stored = f"{store}/{group}{'z' if zero else ''}" if group else store
    name = f"products {'decode' if decode else 'prefill'} x{len(to)} {activation} {stored}".replace("torch.", "")
    name += names[prologue] + (" w8a8" if int8_activations else "")
    # Sums of int8 are exact. Where a norm is not in the launch, the cases with one are not launched together.
    alike = compute != torch.int8 and (prologue == p.PLAIN.value or store in NORM_IN_LAUNCH)
    same_bits = f"{activation} {stored}{'' if prologue == p.PLAIN.value else ' normed'}" if alike else ""
    return Case(
        name, p.products_kernel, types, constants, tile.num_warps, tile.num_stages, decode,
        fp32=compute == torch.float32, int8=compute == torch.int8,
        wide_loads=compute != torch.float32, max_registers=tile.max_registers, same_bits=same_bits,
    )  # fmt: skip


def _attention_case(
    dtype: torch.dtype,
    dim: int,
    group: int,
    tokens: int,
    *,
    splits: bool = False,
    window: int = 0,
    sinks: bool = False,
    many: bool = False,
    int8_cache: bool = False,
) -> Case:
    t = _POINTER[dtype] + "!"
    types = dict.fromkeys(("q", "out"), t)
    types |= dict.fromkeys(("k_cache", "v_cache"), "*i8!" if int8_cache else t)
    types |= dict.fromkeys(("query_start", "context_len", "page_table"), "*i32!")
    types |= {"sequences": "i32", "rows": "i32", "scale_log2": "fp32", "ldt": "i32"}
    strides = ("ldq", "q_head", "ldo", "k_page", "k_head", "k_slot", "v_page", "v_head", "v_slot", "s_page", "s_head")
    types |= dict.fromkeys(strides, "i32!")
    decode = tokens == 1
    tile = attention_tile(group, dim, dtype, decode=decode, many=many, hopper=many)
    constants = {
        "GROUP": group, "HEADS": tile.heads, "DIM": dim, "PAGE": 16, "WINDOW": window, "COMPUTE": operand_dtype(dtype),
        "TOKENS": tile.tokens, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "BLOCK_D": max(16, triton.next_power_of_2(dim)),
    }  # fmt: skip
    optional = {"states": splits, "numerators": splits, "sinks": sinks, "k_scale": int8_cache, "v_scale": int8_cache}
    types |= {name: "*fp32!" for name, there in optional.items() if there}
    constants |= {name: None for name, there in optional.items() if not there}
    name = f"attention {'decode' if decode else 'prefill'} {dtype} D={dim}".replace("torch.", "")
    words = (("splits", splits), ("window", window), ("sinks", sinks), ("many", many), ("int8 cache", int8_cache))
    name += "".join(f" {word}" for word, on in words if on)
    return Case(
        name, paged_attention_kernel, types, constants, tile.num_warps, 2, decode, fp32=dtype == torch.float32,
        max_registers=tile.max_registers, same_bits=f"attention {dtype} D={dim} {int8_cache}", warp_groups=many,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """The specializations that a bf16 or int8 model's decode and prefill launch, and fp32's."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    both, y = p.TO_BOTH, p.TO_Y
    for store, group in (("bf16", 0), ("int8", 0), ("int4", 64), ("int4", 128)):
        yield _linear_case(bf16, store, 1, (both, both, both), group=group)
        yield _linear_case(bf16, store, 1, (both, both, both), group=group, prologue=p.NORM.value)
        yield _linear_case(bf16, store, 512, (y,), group=group)
    yield _linear_case(bf16, "int8", 512, (both, both), prologue=p.FACTOR.value)
    yield _linear_case(bf16, "bf16", 512, (both, both), prologue=p.FACTOR.value)
    for rows in (1, 512):
        yield _linear_case(bf16, "int4", rows, (both,), group=32)
        yield _linear_case(bf16, "int4", rows, (both,), group=32, zero=True)
        yield _linear_case(bf16, "int4", rows, (both,), group=64, zero=True)
        yield _linear_case(fp16, "int4", rows, (both,), group=32, zero=True)
    yield _linear_case(fp32, "int8", 1, (both,))
    yield _linear_case(fp32, "int4", 1, (both,), group=64, prologue=p.NORM.value)
    yield _linear_case(fp32, "fp32", 512, (p.TO_Z,))
    for rows in (1, 512):
        yield _linear_case(bf16, "int8", rows, (both,), int8_activations=True)
    types = {"x": "*bf16!", "factor": "*fp32!", "M": "i32", "K": "i32!", "ldx": "i32!", "eps": "fp32"}
    blocks = {"COMPUTE": operand_dtype(bf16), "BLOCK_M": 32, "BLOCK_K": block_k(bf16, 0)}
    yield Case("inverse rms", p.factor_kernel, types, blocks, 4, 2, same_bits=f"{bf16} bf16 normed")
    types = {"x": "*bf16!", "codes": "*i8!", "scales": "*fp32!", "starts": "*i32!", "widths": "*i32!"}
    types |= dict.fromkeys(("ldx", "ldc", "lds"), "i32!")
    yield Case("quantize rows", quantize_rows_kernel, types, {"BLOCK": 1024}, 4, decode=True, products=False)
    for splits in (False, True):
        yield _attention_case(bf16, 128, 4, 1, splits=splits)
        yield _attention_case(bf16, 64, 8, 1, splits=splits, window=128, sinks=True)
    yield _attention_case(bf16, 128, 4, 512)
    yield _attention_case(bf16, 64, 8, 512, window=128, sinks=True)
    yield _attention_case(bf16, 128, 4, 512, many=True)
    yield _attention_case(bf16, 64, 8, 512, window=128, sinks=True, many=True)
    yield _attention_case(bf16, 128, 4, 1, splits=True, int8_cache=True)
    yield _attention_case(bf16, 128, 4, 512, int8_cache=True)
    yield _attention_case(bf16, 128, 4, 512, many=True, int8_cache=True)
    yield _attention_case(fp32, 64, 3, 1)
    types = dict.fromkeys(("states", "numerators", "sinks"), "*fp32!") | {
        "out": "*bf16!",
        "sequences": "i32",
        "ldo": "i32!",
    }
    types |= dict.fromkeys(("query_start", "context_len"), "*i32!")
    constants = {"DIM": 128, "WINDOW": 128, "BLOCK_D": 128}
    yield Case("merge splits", merge_splits_kernel, types, constants, 1, decode=True, products=False)
    b = "*bf16!"
    types = {"x": b, "residual": b, "weight": b, "normed": b, "total": b, "eps": "fp32"}
    types |= dict.fromkeys(("width", "ldx", "ldr", "ldn", "ldt"), "i32!")
    blocks = {"BLOCK": 4096, "ONE_BLOCK": True}
    yield Case("add_rms_norm 4096", rms_norm_kernel, types, blocks, 8, decode=True, products=False)
    types = {"gate_up": b, "out": b} | dict.fromkeys(("width", "ldg", "ldo"), "i32!")
    yield Case("swiglu", swiglu_kernel, types, {"BLOCK": 1024}, 4, decode=True, products=False)
    types = {"qkv": b, "cos_sin": "*fp32!", "positions": "*i32!", "slots": "*i32!"}
    types |= {"eps": "fp32"}
    numbers = ("ldq", "ldc", "page_size", "k_page", "k_head", "k_slot", "v_page", "v_head", "v_slot")
    types |= dict.fromkeys(numbers, "i32!")
    for rotary, normed, int8_cache in ((128, False, False), (64, False, False), (128, True, False), (64, False, True)):
        heads: dict[str, Any] = {
            "Q_HEADS": 32,
            "KV_HEADS": 8,
            "DIM": 128,
            "ROTARY": rotary,
            "BLOCK_HALF": rotary // 2,
            "BLOCK_DIM": 128,
        }
        heads |= {} if normed else {"norms": None}
        heads |= {} if int8_cache else {"k_scale": None, "v_scale": None}
        name = f"rope_kv_write {rotary} of 128" + (" normed" if normed else "") + (" int8 cache" if int8_cache else "")
        its = types | ({"norms": b} if normed else {})
        its |= dict.fromkeys(("k_cache", "v_cache"), "*i8!" if int8_cache else b)
        its |= {"k_scale": "*fp32!", "v_scale": "*fp32!"} if int8_cache else {}
        yield Case(name, rope_kv_write_kernel, its, heads, 1, decode=True, products=False)
    for masked in (False, True):
        yield _sampling_case(masked)
    types = {"logits": "*fp32!", "greatest": "*fp32!", "total": "*i64!", "vocabulary": "i32!", "ld": "i32!"}
    warps = OPTIONS["num_warps"]
    yield Case(
        "row totals", row_totals_kernel, types, {"BLOCK": BLOCK}, warps, decode=True, products=False, fused=False
    )


def _sampling_case(masked: bool) -> Case:
    types = {"logits": "*fp32!", "shares": "*fp64!", "numbers": "*fp32!", "bias": "*fp32!", "statuses": "*u8!"}
    integers = (
        "limits",
        "penalty_start",
        "penalty_token",
        "penalty_count",
        "bias_start",
        "bias_token",
        "weights",
        "ids",
    )
    types |= dict.fromkeys(integers, "*i32!") | dict.fromkeys(("vocabulary", "ld", "mask_words"), "i32!")
    types |= {"mask": "*i32!"} if masked else {}
    constants = {"BLOCK": BLOCK, "TABLE": 256} | ({} if masked else {"mask": None})
    name = "sample" + (" masked" if masked else "")
    return Case(name, sample_kernel, types, constants, OPTIONS["num_warps"], decode=True, products=False, fused=False)
