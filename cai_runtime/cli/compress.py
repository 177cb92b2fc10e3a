"""`cai compress`: compress a dense model to a slim checkpoint."""

from __future__ import annotations

import argparse

HELP = "compress a model to a slim checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cai_runtime.slim.spec import STORE_ALIASES, STORES

    parser.add_argument("src", metavar="SRC", help="a known name, a URI or a directory, as for `cai pull`")
    parser.add_argument("dst", metavar="DST", help="the directory to make")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--keep",
        type=float,
        metavar="SHARE",
        help="share of the linear layers' parameters to keep (default 0.8); with --elastic, the largest keep (default 1)",
    )
    budget.add_argument(
        "--plan",
        metavar="FILE",
        help="JSON that names kind, rank and store of every layer, or another checkpoint's slim_report.json",
    )
    budget.add_argument(
        "--target-bytes",
        metavar="SIZE",
        help="size of the whole checkpoint (80MB, 1.5GiB), or its share of bf16 (45%%); chooses kind, rank and store of "
        "each layer",
    )
    stores = [*STORES, *STORE_ALIASES]
    parser.add_argument(
        "--store",
        choices=stores,
        metavar="STORE",
        help=f"number format of cores: {', '.join(stores)}; default int8 (with --target-bytes int8 and int4 compete). int4 "
        "has a scale for every 32, 64 or 128 columns, with -zp also a zero point; int4 is short for int4-g64",
    )
    parser.add_argument(
        "--embedding-store",
        choices=stores,
        metavar="STORE",
        help="store of embedding and head (default: as --store, but int8 for int4, which loses more there; with "
        "--target-bytes and no --store it is chosen, too)",
    )
    parser.add_argument(
        "--elastic",
        action="store_true",
        help="write one checkpoint that opens at any keep up to --keep: lowrank cores, not refined, healed on request",
    )
    parser.add_argument(
        "--smallest-keep", type=float, metavar="SHARE", help="with --elastic: the smallest keep to open (default 0.3)"
    )
    parser.add_argument(
        "--kind",
        choices=("interpolative", "lowrank", "mpo", "dense"),
        help="kind of cores (default interpolative, with --elastic lowrank); dense with --target-bytes only quantizes",
    )
    parser.add_argument(
        "--allocation",
        choices=("pooled", "uniform"),
        default="pooled",
        help="pooled: layers compete for parameters (default); uniform: each keeps the same share",
    )
    parser.add_argument(
        "--floor",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="with pooled allocation: smallest share of --keep for a layer (default 0.25)",
    )
    parser.add_argument(
        "--rank-multiple",
        type=int,
        metavar="N",
        help="ranks are multiples of N (default 16, with an int4 store its group)",
    )
    parser.add_argument(
        "--no-curvature",
        action="store_true",
        help="weight errors by the layers' outputs, not by loss gradients: no backward pass, half the time, a worse model",
    )
    parser.add_argument(
        "--shift",
        action="store_true",
        help="fit each layer on inputs from the compressed layers before it",
    )
    parser.add_argument(
        "--refine-epochs",
        type=int,
        metavar="N",
        help="passes over the calibration text that train each block to give the dense block's output (default 2; 0 if a "
        "keep of 0.7 or more is healed)",
    )
    parser.add_argument(
        "--heal-tokens",
        type=int,
        metavar="N",
        help="tokens on which the whole model is trained to predict as the original does (default 65536); both models must "
        "fit into memory",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="neither refine nor heal, unless --refine-epochs or --heal-tokens is given: faster, a worse model",
    )
    parser.add_argument(
        "--calibration",
        action="append",
        metavar="SOURCE",
        help='calibration text: "self" (default: the model writes it), "wikipedia", hf:OWNER/NAME of a dataset, or a .txt, '
        ".jsonl or .parquet file or directory; repeatable. A speech model takes audio files, a directory of them, or a "
        ".jsonl or .tsv list with audio and text",
    )
    parser.add_argument("--samples", type=int, default=48, metavar="N", help="calibration sequences (default 48)")
    parser.add_argument(
        "--sequence-length", type=int, default=512, metavar="N", help="tokens in each of them (default 512)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:n] (default cpu)")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="dtype in which the model runs (default: bf16 on CUDA; on the CPU fp32, with bf16 products in training if the "
        "processor has instructions for them)",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration sequences (default 0)")
    parser.add_argument(
        "--no-evaluation",
        action="store_true",
        help="do not evaluate the result on unseen text for the report",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint DST once the new one is complete"
    )
    parser.add_argument(
        "--restart", action="store_true", help="discard the unfinished work of a call with other options for DST"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, the size of the result and the time it takes; compress nothing",
    )
    parser.add_argument(
        "--no-progress", action="store_true", help="no progress bars (there are none without a terminal either)"
    )


def run(args: argparse.Namespace) -> int:
    from cai_runtime.compressor import compress, dry_run

    options = {
        "keep": args.keep,
        "target_bytes": args.target_bytes,
        "store": args.store,
        "kind": args.kind,
        "allocation": args.allocation,
        "curvature": not args.no_curvature,
        "shift": args.shift,
        "refine_epochs": args.refine_epochs,
        "heal_tokens": args.heal_tokens,
        "calibration": args.calibration[0] if args.calibration and len(args.calibration) == 1 else args.calibration,
        "samples": args.samples,
        "sequence_length": args.sequence_length,
        "embedding_store": args.embedding_store,
        "rank_multiple": args.rank_multiple,
        "floor": args.floor,
        "plan": args.plan,
        "elastic": args.elastic,
        "smallest_keep": args.smallest_keep,
        "device": args.device,
        "dtype": args.dtype,
        "seed": args.seed,
    }
    if args.fast:
        options |= {name: options[name] or 0 for name in ("refine_epochs", "heal_tokens")}
    options = {name: value for name, value in options.items() if value is not None}
    common = {"overwrite": args.overwrite, "progress": False if args.no_progress else None}
    if args.dry_run:
        plan, rate = dry_run(args.src, args.dst, **common, **options)
        print(plan.summary(rate))
        return 0
    try:
        report = compress(
            args.src, args.dst, **options, **common, evaluate=not args.no_evaluation, restart=args.restart
        )
    except KeyboardInterrupt:
        _say_how_to_go_on(args.dst)
        raise
    print(report.summary())
    print(args.dst)
    return 0


def _say_how_to_go_on(dst: str) -> None:
    """After Ctrl-C, print on stderr, below the progress bar, whether the work can go on."""
    import sys

    from cai_runtime.compressor.work import work_directory
    from cai_runtime.slim.destination import destination

    directory = work_directory(destination(dst))
    if directory.exists():
        text = f"what is finished is kept in {directory}; run the same command again to go on, or remove it"
    else:
        text = "nothing is left behind"
    print(f"\ninterrupted: {text}", end="", file=sys.stderr)
