"""Show what a checkpoint holds and how it was made.

Kind, rank, stores, parameters, bytes, keep and error of each module; the recommended sampling parameters; source,
calibration, versions, times and quality from the report.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "show what a checkpoint holds: kind, rank, parameters, bytes and keep per module"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="checkpoint directory, slim or plain dense")
    parser.add_argument("--all", action="store_true", help="one line for every module, not one per kind of layer")
    parser.add_argument("--keep", type=float, metavar="SHARE", help="show an elastic checkpoint at this keep")
    parser.add_argument("--json", action="store_true", help="print JSON with every module")
    parser.add_argument(
        "--picture", metavar="FILE", type=Path, help="draw rank, keep and error over depth as PNG (extra: plot)"
    )
    parser.add_argument("--verify", action="store_true", help="also read every weight and fail on NaN or infinity")


def run(args: argparse.Namespace) -> int:
    from cai_runtime.slim.inspect import format_inspection, inspect_checkpoint

    if args.picture is not None:
        from cai_runtime.judge.picture import check_picture

        check_picture(args.picture)
    inspection = inspect_checkpoint(args.dir, keep=args.keep)
    if args.verify:
        from cai_runtime.slim.reader import Checkpoint

        with Checkpoint.open(args.dir) as checkpoint:
            checkpoint.verify()
    if args.picture is not None:
        from cai_runtime.judge.picture import draw_inspection

        draw_inspection(inspection, args.picture)
    if args.json:
        print(json.dumps(inspection.to_json(), indent=2))
    else:
        print(format_inspection(inspection, every_module=args.all))
    return 0
