"""Continue a text and print the continuation."""

from __future__ import annotations

import argparse
import sys

HELP = "continue a text"
DEFAULT_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cai_runtime.cli.options import MODEL_HELP, add_model_arguments, add_sampling_arguments

    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="+",
        help="the text; several words are joined by spaces; - reads standard input",
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the text as it comes; default, except with --json",
    )
    parser.add_argument("--json", action="store_true", help="print the API's object, or with --stream its chunks")
    add_sampling_arguments(parser, max_tokens=DEFAULT_TOKENS)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from cai_runtime.cli.options import open_client, sampling

    prompt = sys.stdin.read() if args.prompt == ["-"] else " ".join(args.prompt)
    streaming = not args.json if args.stream is None else args.stream
    with open_client(args.model, args) as client:
        if not streaming:
            reply = client.completions.create(prompt=prompt, stream=False, **sampling(args))
            print(reply.model_dump_json(indent=2) if args.json else reply.choices[0].text)
            return 0
        with client.completions.create(prompt=prompt, stream=True, **sampling(args)) as stream:
            for chunk in stream:
                if args.json:
                    print(chunk.model_dump_json(), flush=True)
                elif chunk.choices:
                    print(chunk.choices[0].text, end="", flush=True)
        if not args.json:
            print()
    return 0
