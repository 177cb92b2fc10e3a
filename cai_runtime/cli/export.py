"""`cai export --dense SRC DIR`: write a slim checkpoint as a stock dense one, which needs no cai_runtime to load.

Its weights are the slim model's, multiplied out: the slim model's quality, a dense model's size and speed.
"""

from __future__ import annotations

import argparse

HELP = "write a slim checkpoint as a stock dense one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cai_runtime.slim.export import DEFAULT_SHARD_BYTES, EXPORT_DTYPES

    parser.add_argument("src", metavar="SRC", help="directory of a slim checkpoint")
    parser.add_argument("dst", metavar="DIR", help="the directory to make")
    parser.add_argument("--dense", action="store_true", required=True, help="write every module as its dense matrix")
    parser.add_argument("--dtype", choices=EXPORT_DTYPES, default="bf16", help="of the weights (default bf16)")
    parser.add_argument(
        "--keep", type=float, metavar="SHARE", help="of an elastic checkpoint: the keep to write (default: its largest)"
    )
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        default=DEFAULT_SHARD_BYTES,
        metavar="N",
        help="largest size of a file; a larger tensor gets its own file (default 1 GiB)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR")


def run(args: argparse.Namespace) -> int:
    from cai_runtime.slim.export import export_dense

    options = {name: getattr(args, name) for name in ("dtype", "keep", "max_shard_bytes", "overwrite")}
    print(export_dense(args.src, args.dst, **options))
    return 0
