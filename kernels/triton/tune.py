"""Measures tiles of the matrix products on the GPU that is there, and keeps the fastest for it.

    python -m cai_runtime.kernels.triton.tune [--shapes 4096x4096,2048x4096] [--stores bf16,int8,int4/64] [--dtype bfloat16]

Shapes are columns of the result x input features of one core. Each is measured with one row and with 512; every tile must
give the default's bits, or it is out. The weights of a measurement rotate through more memory than the caches hold.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import triton

from cai_runtime.errors import CaiError, KernelError
from cai_runtime.home import cai_home
from cai_runtime.kernels.triton import tuning
from cai_runtime.kernels.triton.launch import interpreting
from cai_runtime.kernels.triton.linear import TritonLinear
from cai_runtime.kernels.triton.tiles import Products, Tile, default_tile
from cai_runtime.kernels.weights import INT4_GROUPS, Core, LinearWeights
from cai_runtime.progress import progress_bar

SHAPES = ((1024, 4096), (2048, 4096), (4096, 2048), (8192, 4096), (14336, 2048), (2048, 14336))
STORES = ("bf16", "int8", "int4/64", "int4/128")
ROWS = {True: 1, False: 512}
ROTATED_BYTES = 256 << 20  # of weights, several times a large GPU's second-level cache
_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def candidates(products: Products) -> Iterator[Tile]:
    """Tiles worth a try; the default is the first."""
    yield default_tile(products)
    if products.decode:
        for block_n, warps, stages in itertools.product((16, 32, 64), (1, 2, 4), (2, 3, 4, 6, 8)):
            yield Tile(16, block_n, warps, stages, 255 if products.store == "int4" else None)
        return
    heights = (64, 128) if products.compute == torch.int8 else (16, 32)
    for block_m, block_n, warps, stages in itertools.product(heights, (32, 64, 128, 256), (4, 8), (2, 3, 4)):
        yield Tile(block_m, block_n, warps, stages)


def random_core(store: str, columns: int, features: int, device: torch.device) -> Core:
    """A core of random bits [columns, features] of a store: fp32, bf16, fp16, int8 or int4/GROUP. Raises KernelError for
    another store."""
    if store in _FLOATS:
        return Core(
            (torch.randn(columns, features, dtype=torch.float32, device=device) / features**0.5).to(_FLOATS[store])
        )
    if store == "int8":
        data = torch.randint(-127, 128, (columns, features), dtype=torch.int8, device=device)
        return Core(data, torch.full((columns,), 0.01 / features**0.5, dtype=torch.float32, device=device))
    group = int(store[5:]) if store.startswith("int4/") and store[5:].isdigit() else 0
    if group not in INT4_GROUPS:
        raise KernelError(f"unknown store {store!r}; known: {', '.join(_FLOATS)}, int8, int4/32, int4/64, int4/128")
    data = torch.randint(0, 256, (columns, -(-features // 2)), dtype=torch.uint8, device=device)
    scale = torch.full((columns, -(-features // group)), 0.1 / features**0.5, dtype=torch.bfloat16, device=device)
    return Core(data, scale, None, group, features)


def milliseconds(linears: Sequence[TritonLinear], x: torch.Tensor) -> float:
    """Of one linear, on average over three passes through `linears` in a captured graph, so that no launch is waited for."""
    linears[0](x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for linear in linears:
            linear(x)
    graph.replay()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(3):
        graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / (3 * len(linears))


def tune(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    stores: Sequence[str] = STORES,
    dtype: torch.dtype = torch.bfloat16,
    *,
    show: bool | None = None,
) -> tuple[Path, dict[str, Tile]]:
    """Measure and write. shapes: (columns, features) of cores; dtype: of activations; show: a bar, None: on a terminal.

    Returns the file, in `<cai home>/tuning/`, and the fastest tile of each family. Raises KernelError where there is no GPU,
    for an unknown store, and when the file can't be written.
    """
    if interpreting() or not torch.cuda.is_available():
        raise KernelError("no GPU is seen, so there is nothing to tune: the defaults stay")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    best: dict[str, Tile] = {}
    work = list(itertools.product(stores, shapes, (True, False)))
    with progress_bar("tuning", total=len(work), unit="shape", show=show) as bar:
        for store, (columns, features), decode in work:
            core = random_core(store, columns, features, device)
            copies = max(1, min(64, ROTATED_BYTES // core.nbytes))
            cores = [core, *(core.map(torch.clone) for _ in range(copies - 1))]
            bar.set_postfix_str(f"{store} {columns}x{features}")
            family, tile = _fastest([LinearWeights("dense", features, columns, (c,)) for c in cores], dtype, decode)
            best[family] = tile
            bar.update()
    path = cai_home() / "tuning" / tuning.file_name(name)
    tuning.write_tiles(path, name, best)
    tuning.tuned_tiles.cache_clear()
    return path, best


def _fastest(weights: Sequence[LinearWeights], dtype: torch.dtype, decode: bool) -> tuple[str, Tile]:
    """The family of these weights' products, and its fastest tile."""
    x = torch.randn(
        ROWS[decode], weights[0].in_features, dtype=torch.float32, device=weights[0].cores[0].data.device
    ).to(dtype)
    asked: list[Products] = []

    def note(products: Products) -> Tile:
        if products.decode == decode:
            asked.append(products)
        return default_tile(products)

    wanted = TritonLinear(weights[:1], tiles=note)(x)
    products = asked[0]
    times: dict[Tile, float] = {}
    for tile in dict.fromkeys(candidates(products)):
        linears = [
            TritonLinear([w], tiles=lambda p, t=tile: t if p.decode == decode else default_tile(p)) for w in weights
        ]
        try:
            same = torch.equal(linears[0](x), wanted)
        except triton.runtime.errors.OutOfResources:
            continue
        if same:
            times[tile] = milliseconds(linears, x)
        else:
            print(f"{tuning.family(products)}: {tile} changes bits", file=sys.stderr)
    return tuning.family(products), min(times, key=times.__getitem__)


def _shapes(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(n), int(k)) for n, k in (part.split("x") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma list such as 4096x4096,2048x4096") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Find the fastest tiles of the Triton matrix products on this GPU.")
    parser.add_argument("--shapes", type=_shapes, default=SHAPES, help="comma list of COLUMNSxFEATURES of cores")
    parser.add_argument("--stores", default=",".join(STORES), help="comma list of fp32, bf16, fp16, int8, int4/GROUP")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of activations (default bfloat16)")
    args = parser.parse_args(argv)
    try:
        path, best = tune(args.shapes, [s for s in args.stores.split(",") if s], _DTYPES[args.dtype])
    except CaiError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for family, tile in best.items():
        print(f"{family:<44}{tile}")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
