"""`cai inspect DIR`: per module its kind, rank, stores, parameters, bytes and keep."""

from __future__ import annotations

import argparse
import json

HELP = "show what a checkpoint holds: kind, rank, parameters, bytes and keep per module"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="checkpoint directory, slim or plain dense")
    parser.add_argument("--all", action="store_true", help="one line for every module, not one per kind of layer")
    parser.add_argument("--json", action="store_true", help="print JSON, every module in it")
    parser.add_argument("--verify", action="store_true", help="also read every weight and refuse NaN and infinity")


def run(args: argparse.Namespace) -> int:
    from cai_runtime.slim.inspect import format_inspection, inspect_checkpoint

    inspection = inspect_checkpoint(args.dir)
    if args.verify:
        from cai_runtime.slim.reader import Checkpoint

        with Checkpoint.open(args.dir) as checkpoint:
            checkpoint.verify()
    if args.json:
        print(json.dumps(inspection.to_json(), indent=2))
    else:
        print(format_inspection(inspection, every_module=args.all))
    return 0
