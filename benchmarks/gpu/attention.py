"""Times paged attention with Llama-3.1-8B's heads beside torch's attention over contiguous keys.

Cases are decode (one token per sequence) and prefill (a chunk of one prompt). Each result is first compared with float64."""

from __future__ import annotations

from typing import Any

from gpu.context import PAGE_SIZE, Context
from gpu.report import Findings
from gpu.timing import graph_seconds, release, sets_needed

TOLERANCE = 1e-2  # relative error against float64


def run(findings: Findings, context: Context) -> None:
    run_prefill(findings, context)
    for positions, sequences in context.scale.attention:
        findings.attempt(
            f"decode {positions} x {sequences}",
            lambda p=positions, s=sequences: _decode(findings, context, p, s),
        )
        release()


def run_prefill(findings: Findings, context: Context) -> None:
    for before, new in context.scale.prompts:
        findings.attempt(f"prefill {before}+{new}", lambda b=before, n=new: _prefill(findings, context, b, n))
        release()


def _heads(context: Context) -> tuple[int, int, int]:
    c = context.scale.config
    return c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"] // c["num_attention_heads"]


def _ints(values: list[int], device: str) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.int32, device=device)


def _caches(context: Context, sequences: int, positions: int, count: int) -> tuple[list[Any], Any]:
    """`count` caches (keys, values) of random bf16, and a page table int32 [sequences, pages] in random order."""
    import torch

    _, kv_heads, dim = _heads(context)
    pages = sequences * -(-positions // PAGE_SIZE)

    def draw() -> Any:
        return torch.randn(pages, kv_heads, PAGE_SIZE, dim, device=context.device).bfloat16()

    table = torch.randperm(pages, device=context.device).to(torch.int32).view(sequences, -1)
    return [(draw(), draw()) for _ in range(count)], table


def _gathered(cache: Any, table: Any, positions: int) -> Any:
    """The cache's rows as torch's attention takes keys and values: [sequences, heads, positions, dim]."""
    sequences, (_, heads, _, dim) = table.shape[0], cache.shape
    return cache[table.long()].transpose(2, 3).reshape(sequences, -1, heads, dim)[:, :positions].transpose(1, 2)


def _decode(findings: Findings, context: Context, positions: int, sequences: int) -> None:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from cai_runtime.kernels.triton import paged_attention

    heads, kv_heads, dim = _heads(context)
    nbytes = 2 * 2 * sequences * positions * kv_heads * dim
    caches, table = _caches(context, sequences, positions, min(sets_needed(nbytes), 64))
    q = torch.randn(sequences, heads, dim, device=context.device).bfloat16()
    starts = _ints(list(range(sequences + 1)), context.device)
    lengths = _ints([positions] * sequences, context.device)

    def ours(k: Any, v: Any) -> Any:
        return paged_attention(q, k, v, starts, lengths, table, dim**-0.5)

    flat = [(_gathered(k, table, positions), _gathered(v, table, positions)) for k, v in caches]
    wanted = scaled_dot_product_attention(q[:, :, None].double(), *(t.double() for t in flat[0]), enable_gqa=True)
    error = _error(ours(*caches[0]), wanted.reshape(sequences, -1))
    flat = [(k.contiguous(), v.contiguous()) for k, v in flat]
    theirs = graph_seconds(
        [lambda k=k, v=v: scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True) for k, v in flat]
    )
    seconds = graph_seconds([lambda k=k, v=v: ours(k, v) for k, v in caches])
    findings.add(
        what="decode", context=positions, sequences=sequences, seconds=seconds, sdpa_seconds=theirs, error=error,
        kv_bytes=nbytes, fraction_of_copy=nbytes / seconds / context.bandwidth,
    )  # fmt: skip


def _prefill(findings: Findings, context: Context, before: int, new: int) -> None:
    """Prefill of `new` tokens of a sequence whose cache holds `before` tokens."""
    import torch
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    from cai_runtime.kernels.triton import paged_attention

    heads, kv_heads, dim = _heads(context)
    positions = before + new
    ((k, v),), table = _caches(context, 1, positions, 1)
    q = torch.randn(new, heads, dim, device=context.device).bfloat16()
    starts, lengths = _ints([0, new], context.device), _ints([positions], context.device)

    def ours() -> Any:
        return paged_attention(q, k, v, starts, lengths, table, dim**-0.5)

    # torch's fused kernels take a lower right causal mask only if there are as many key heads as query heads.
    flat = [_gathered(t, table, positions).repeat_interleave(heads // kv_heads, 1).contiguous() for t in (k, v)]
    query = q.transpose(0, 1)[None]
    bias = causal_lower_right(new, positions)
    checked = slice(max(new - 64, 0), new)  # float64 is slow: compare the last 64 rows
    mask = torch.ones(new, positions, dtype=torch.bool, device=context.device).tril(before)[checked]
    wanted = scaled_dot_product_attention(query[:, :, checked].double(), *(t.double() for t in flat), attn_mask=mask)
    error = _error(ours()[checked], wanted[0].transpose(0, 1).reshape(-1, heads * dim))
    flops = 4 * heads * dim * new * (before + new / 2)
    seconds = graph_seconds([ours])
    entry = {"what": "prefill", "before": before, "new": new, "seconds": seconds, "error": error}
    entry["flops_per_second"] = flops / seconds
    try:
        entry["sdpa_seconds"] = graph_seconds([lambda: scaled_dot_product_attention(query, *flat, attn_mask=bias)])
    except (RuntimeError, NotImplementedError) as sdpa:  # torch's kernel can't run this case: not our fault
        entry["sdpa"] = str(sdpa)[:200]
    findings.add(**entry)


def _error(got: Any, wanted: Any) -> float:
    """The relative error of a result. Raises RuntimeError above TOLERANCE."""
    error = float((got.double() - wanted).norm() / wanted.norm())
    if not error < TOLERANCE:
        raise RuntimeError(f"relative error {error:.2e} against float64")
    return error
