"""Answer a file of requests in OpenAI's batch format, and write the results to another.

A line of IN: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}. Results come as they are
done; `custom_id` says whose they are. What is wrong with one line stops no other, and gives no other exit status.

OUT may be the output of a run that was stopped or killed: what it holds is not done again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cai_runtime.client import Client

HELP = "answer a file of requests in OpenAI's batch format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cai_runtime.cli.options import MODEL_HELP, add_model_arguments

    parser.add_argument("input", metavar="IN", help="a JSON Lines file of requests")
    parser.add_argument("output", metavar="OUT", help="the file for the results, which are appended")
    parser.add_argument("--model", metavar="MODEL", help=f"of requests that name none: {MODEL_HELP.partition(';')[0]}")
    parser.add_argument(
        "--serve",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="a name in the requests, such as gpt-4o-mini, and the checkpoint that answers to it; may be repeated",
    )
    parser.add_argument("--ordered", action="store_true", help="write results in the order of the requests")
    parser.add_argument(
        "--window", type=int, metavar="N", help="requests under way at once; default: twice the engine's"
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds, of requests that name no timeout")
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="show a bar; default: on a terminal only"
    )
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with _client(args) as client:
        try:
            summary = client.batch(
                args.input, args.output, ordered=args.ordered, window=args.window, progress=args.progress
            )
        except KeyboardInterrupt:
            print(f"\ninterrupted: {args.output} is whole; the same command goes on from there", file=sys.stderr)
            raise
    before = f", of these {summary.resumed} by an earlier run" if summary.resumed else ""
    print(f"{summary.succeeded} succeeded, {summary.failed} failed{before}: {args.output}", file=sys.stderr)
    return 0


def _client(args: argparse.Namespace) -> Client:
    from cai_runtime.cli.options import client_options, find_model
    from cai_runtime.client import Client
    from cai_runtime.errors import OptionValueError

    models: dict[str, str | Path] = {}
    for given in args.serve:
        name, found, directory = given.partition("=")
        if not (name and found and directory):
            raise OptionValueError(f"--serve takes NAME=DIR, got {given!r}")
        models[name] = find_model(directory, pull=args.pull)[1] or directory
    options: dict[str, Any] = {**client_options(args), "timeout": args.timeout}
    if args.model is None:
        return Client(models=models, **options)
    if args.model in models:
        return Client(args.model, models=models, **options)
    name, path = find_model(args.model, pull=args.pull)
    return Client(name, models=models if path is None else {**models, name: path}, **options)
