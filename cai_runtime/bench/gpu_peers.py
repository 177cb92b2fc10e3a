"""Kernels of other libraries on a GPU, where these are installed: FlashInfer's paged attention and vLLM's Marlin.

Their interfaces: FlashInfer 0.7 (docs.flashinfer.ai), vLLM 0.33 (`vllm/_custom_ops.py`). vLLM does not promise that its
operations keep their arguments, so these are passed by name, as far as the installed version has them.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from cai_runtime.bench.attention_cases import PAGE_SIZE, Case
from cai_runtime.errors import KernelError

if TYPE_CHECKING:
    import torch

    from cai_runtime.bench.timing import Call
    from cai_runtime.kernels.weights import LinearWeights

WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends
TENSOR_CORE_HEADS = 4  # query heads of a key head from which FlashInfer's decode by matrix units pays, vLLM's threshold


def installed(package: str) -> bool:
    """Whether a top-level package can be imported. Does not import it."""
    return importlib.util.find_spec(package) is not None


@contextmanager
def _as_kernel_error(library: str) -> Iterator[None]:
    """What another library raises for a case that it can't do, or for its own set-up, has no common type."""
    try:
        yield
    except KernelError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        raise KernelError(f"{library}: {type(error).__name__}: {text[0] if text else ''}") from error


def flashinfer_calls(case: Case, sets: int, device: str, dtype: str) -> list[Call]:
    """`sets` calls of FlashInfer's attention, each on its own queries and paged cache, of shuffled pages.

    As for torch, queries and keys are rotated and the cache is filled beforehand. The call is planned before it is timed.
    Raises KernelError if FlashInfer does not support the case.
    """
    import torch

    with _as_kernel_error("FlashInfer"):
        import flashinfer

        heads, held = case.heads, getattr(torch, dtype)
        q, k, v = case.gathered(device, dtype, dtype)
        pages = -(-case.context // PAGE_SIZE)
        order = torch.randperm(case.batch * pages, generator=torch.Generator().manual_seed(0)).to(device)
        cache = torch.zeros(case.batch * pages, 2, PAGE_SIZE, heads.kv, heads.dim, dtype=held, device=device)
        for part, x in enumerate((k, v)):
            padded = torch.zeros(case.batch, pages * PAGE_SIZE, heads.kv, heads.dim, dtype=held, device=device)
            padded[:, : case.context] = x.transpose(1, 2)
            cache[order, part] = padded.view(-1, PAGE_SIZE, heads.kv, heads.dim)
        counting = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
        last = torch.full((case.batch,), (case.context - 1) % PAGE_SIZE + 1, dtype=torch.int32, device=device)
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        paged = (counting * pages, order.to(torch.int32), last)
        sizes = (heads.query, heads.kv, heads.dim, PAGE_SIZE)
        options: dict[str, Any] = {
            "window_left": -1 if case.window is None else case.window - 1,
            "sm_scale": case.scale,
            "q_data_type": held,
            "kv_data_type": held,
        }
        if case.mode == "decode":
            by_matrix_units = heads.query // heads.kv >= TENSOR_CORE_HEADS
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=by_matrix_units)
            wrapper.plan(*paged, *sizes, **options)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            wrapper.plan(counting * case.new, *paged, *sizes, causal=True, **options)
    q = q.reshape(-1, heads.query, heads.dim)

    def run(q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        with _as_kernel_error("FlashInfer"):
            return wrapper.run(q, cache).reshape(-1, heads.query * heads.dim)

    return [partial(run, q.clone(), cache.clone()) for _ in range(sets)]


def marlin(members: Sequence[LinearWeights], arena: object) -> Callable[[torch.Tensor], torch.Tensor]:
    """vLLM's Marlin (Frantar et al. 2024) on dense int4 or int8 weights, the members stacked.

    x bf16 [M, in] -> y bf16 [M, out of all members]. Marlin holds scales in bf16; those of int8 are rounded to it. Raises
    KernelError if vLLM has no Marlin of this interface or it does not take the shape.
    """
    import torch

    from cai_runtime.slim.int4 import unpack

    cores = [w.cores[0] for w in members]
    core, size_n, size_k = cores[0], sum(c.shape[0] for c in cores), cores[0].shape[1]
    bits = 4 if core.is_int4 else 8
    group = core.group if core.is_int4 else -1
    if size_k % 128 or size_n % 64:
        raise KernelError(f"Marlin takes multiples of 128 columns and 64 rows, not {size_n} rows of {size_k}")
    with _as_kernel_error("vLLM"):
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils.marlin_utils import (
            marlin_make_workspace_new,
            marlin_permute_scales,
        )
        from vllm.scalar_type import scalar_types

        # From 0 on, int32 [N, K].
        codes = torch.cat([unpack(c.data, size_k).int() if c.is_int4 else c.data.int() + 128 for c in cores])
        scales = torch.cat([c.scale.view(c.shape[0], -1) for c in cores if c.scale is not None]).bfloat16()
        packed = _call(
            ops.gptq_marlin_repack,
            b_q_weight=packed_columns(codes.T, bits),
            perm=torch.empty(0, dtype=torch.int32, device=codes.device),
            size_k=size_k,
            size_n=size_n,
            num_bits=bits,
        )
        gemm = getattr(ops, "marlin_gemm" if hasattr(ops, "marlin_gemm") else "gptq_marlin_gemm")
        fixed = {
            "c": None,
            "b_q_weight": packed,
            "b_bias": None,
            "b_scales": marlin_permute_scales(scales.T.contiguous(), size_k, size_n, group),
            "a_scales": None,
            "global_scale": None,
            "b_zeros": None,
            "g_idx": None,
            "perm": None,
            "workspace": marlin_make_workspace_new(codes.device),
            "b_q_type": scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128,
            "size_n": size_n,
            "size_k": size_k,
            "use_fp32_reduce": True,
        }

    def run(x: torch.Tensor) -> torch.Tensor:
        with _as_kernel_error("vLLM"):
            return _call(gemm, a=x, size_m=x.shape[0], **fixed)

    return run


def packed_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [K / (32 / bits), N] of codes int32 [K, N], as GPTQ packs them: the first row of a word in its lowest bits."""
    import torch

    each = 32 // bits
    words = codes.reshape(codes.shape[0] // each, each, codes.shape[1]).long()
    shifts = torch.arange(0, 32, bits, device=codes.device)[:, None]
    total = (words << shifts).sum(dim=1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()


def _call(function: Callable[..., Any], **values: Any) -> Any:
    """Call with those values that the function has arguments for. Raises KernelError if it needs others."""
    parameters = inspect.signature(function).parameters
    needed = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty and name not in values]
    if needed:
        raise KernelError(f"{function.__name__} of this version needs {', '.join(needed)}, which is unknown here")
    return function(**{name: value for name, value in values.items() if name in parameters})
