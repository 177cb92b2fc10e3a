"""`cai compress`: a dense model to a slim checkpoint."""

from __future__ import annotations

import argparse

HELP = "compress a model to a slim checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cai_runtime.slim.spec import STORE_ALIASES, STORES

    parser.add_argument("src", metavar="SRC", help="a known name, a URI or a directory, as for `cai pull`")
    parser.add_argument("dst", metavar="DST", help="the directory to make")
    parser.add_argument(
        "--keep", type=float, default=0.8, metavar="SHARE", help="parameters of the linear layers to keep (default 0.8)"
    )
    stores = [*STORES, *STORE_ALIASES]
    parser.add_argument(
        "--store",
        choices=stores,
        default="int8",
        metavar="STORE",
        help=f"how cores are stored: {', '.join(stores)}; default int8. int4: a scale for every 32, 64 or 128 columns, -zp: "
        "a zero point, too; int4 alone is int4-g64",
    )
    parser.add_argument(
        "--embedding-store",
        choices=stores,
        metavar="STORE",
        help="store of embedding and head (default: as --store, but int8 with int4, which would hurt there)",
    )
    parser.add_argument("--kind", choices=("interpolative", "lowrank"), default="interpolative", help="kind of cores")
    parser.add_argument(
        "--allocation",
        choices=("pooled", "uniform"),
        default="pooled",
        help="layers compete for parameters (default), or each gets the same share",
    )
    parser.add_argument(
        "--floor",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="pooled: least share of --keep for a layer (default 0.25)",
    )
    parser.add_argument(
        "--rank-multiple", type=int, default=16, metavar="N", help="ranks are multiples of N (default 16)"
    )
    parser.add_argument(
        "--no-curvature",
        action="store_true",
        help="weigh errors by the layers' outputs alone: no backward pass, half the time, a worse model",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help='.txt, or .jsonl of objects with a "text" (default: half of the Wikipedia sample)',
    )
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="calibration sequences (default 16)")
    parser.add_argument(
        "--sequence-length", type=int, default=512, metavar="N", help="tokens in each of them (default 512)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:n] (default cpu)")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="in which the model runs (default: fp32 on the CPU, bf16 on CUDA)",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration sequences (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace DST")


def run(args: argparse.Namespace) -> int:
    from cai_runtime.compress import compress

    report = compress(
        args.src,
        args.dst,
        keep=args.keep,
        store=args.store,
        kind=args.kind,
        allocation=args.allocation,
        curvature=not args.no_curvature,
        calibration=args.calibration,
        samples=args.samples,
        sequence_length=args.sequence_length,
        embedding_store=args.embedding_store,
        rank_multiple=args.rank_multiple,
        floor=args.floor,
        device=args.device,
        dtype=args.dtype,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    print(report.summary())
    print(args.dst)
    return 0
