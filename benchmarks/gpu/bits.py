"""Compares the bits of one product between tiles, and so between matrix instructions.

On Hopper, Triton compiles tiles of at least 64 rows and 4 warps to wgmma, smaller ones to mma.sync. The library uses only
tiles of mma.sync, since the bits of a row must not depend on its batch. If all tiles give the same bits, prefill may use the
large ones. Differences are counted in units in the last place (ulp) of the result."""

from __future__ import annotations

from typing import Any

from gpu.context import Context
from gpu.report import Findings

# block_m, block_n, num_warps, num_stages
BASE = (16, 16, 2, 4)  # the tile of decode
TILES = ((16, 16, 2, 4), (32, 128, 4, 2), (64, 128, 4, 3), (128, 128, 8, 3), (128, 256, 8, 3))
STORES = ("bf16", "fp16", "int8", "int4")


def run(findings: Findings, context: Context) -> None:
    for store in STORES:
        findings.attempt(store, lambda s=store: _store(findings, context, s))


def _store(findings: Findings, context: Context, store: str) -> None:
    import torch

    from cai_runtime.bench.factors import RandomWeights
    from cai_runtime.kernels.slim_linear import reference
    from cai_runtime.kernels.triton.linear import TritonLinear
    from cai_runtime.kernels.triton.tiles import Tile
    from cai_runtime.kernels.weights import LinearWeights

    out, inp, rows = (64, 256, 20) if context.rehearsal else (1024, 4096, 256)
    core = RandomWeights(context.device, group=128).core(out, inp, store)
    w = LinearWeights("dense", inp, out, (core,))
    dtype = torch.float16 if store == "fp16" else torch.bfloat16
    x = torch.randn(rows, inp, device=context.device).to(dtype)
    judge = reference(x.double(), w)

    def through(tile: tuple[int, ...]) -> Any:
        return TritonLinear([w], tiles=lambda p: Tile(*tile, max_registers=None))(x)

    base = through(BASE)
    for tile in TILES:
        name = "x".join(map(str, tile[:2]))
        try:
            y = through(tile)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
            findings.add(store=store, kernel=f"triton {name}", equal=None, error=f"does not fit: {str(error)[:200]}")
            continue
        _compare(findings, store, f"triton {name}", y, base, judge)
    if "cuda" in context.backends:
        from cai_runtime.kernels.cuda import FEW_ROWS, CudaLinear

        linear = CudaLinear([w])
        _compare(findings, store, "cuda", linear(x[:FEW_ROWS]), base[:FEW_ROWS], judge[:FEW_ROWS])
        # Few rows at a time are by mma.sync, more by warp groups' products: first with columns divided among blocks.
        for count in (20, 40) if context.rehearsal else (64, 4096):
            some = x.repeat(-(-count // rows), 1)[:count]
            parts = torch.cat([linear(part) for part in some.split(FEW_ROWS)])
            wanted = judge.repeat(-(-count // rows), 1)[:count]
            _compare(findings, store, f"cuda {count} rows against {FEW_ROWS}", linear(some), parts, wanted, alike=True)


def _compare(
    findings: Findings, store: str, kernel: str, y: Any, base: Any, judge: Any, *, alike: bool = False
) -> None:
    steps = ulp_distance(y, base)
    error = float((y.double() - judge).norm() / judge.norm())
    findings.add(
        store=store, kernel=kernel, equal=not bool(steps.any()), share_different=float((steps != 0).float().mean()),
        most_ulp=int(steps.max()), error=error,
    )  # fmt: skip
    if alike and bool(steps.any()):
        findings.problem(f"{store} {kernel}: other bits, up to {int(steps.max())} steps apart")
    if not error < 1e-2:
        findings.problem(f"{store} {kernel}: relative error {error:.2e} against float64")


def ulp_distance(a: Any, b: Any) -> Any:
    """The distance between elements of two tensors of the same 16-bit float dtype, in representable values; int32."""
    import torch

    def rank(t: Any) -> Any:  # of each value among all values of the dtype
        bits = t.contiguous().view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (rank(a) - rank(b)).abs()
