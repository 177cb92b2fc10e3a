"""Asks a model for a value of each of 200 JSON schemas: `python benchmarks/schemas.py [MODEL] [--count N] [--out FILE]`.

The schemas are those of JSON-Schema-Test-Suite (draft 2020-12, tests/grammars/data) that `response_format` takes, spread
over its files. Every reply that ended by itself must be valid under `jsonschema`, formats included; it fails otherwise. A
reply that ran into its limit is counted as cut off. Refused schemas are counted, too: none is weakened.

MODEL: a directory, or a name that `cai pull` knows, by default qwen2.5-coder-0.5b-instruct. Half of the texts are greedy,
half at temperature 1. Writes benchmarks/results/schemas.json with machine and date, the replies included.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from cai_runtime import BadRequestError, Client
from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.cli.options import checkpoint_name

RESULTS = Path(__file__).parent / "results"
SUITE = Path(__file__).parent.parent / "tests" / "grammars" / "data" / "json_schema_test_suite.json"
IN_FLIGHT = 16
SERVED = ("valid", "invalid", "cut off")
SYSTEM = "You answer with one JSON value and nothing else."


def schemas() -> list[tuple[str, Any]]:
    """(file and group, schema): the first group of every file, then the second of every file, and so on."""
    suite = json.loads(SUITE.read_text("utf-8"))
    files = [[(f"{file}: {about}", schema) for about, schema, _ in groups] for file, groups in suite.items()]
    return [each for each in chain.from_iterable(zip_longest(*files)) if each is not None]


def ask(client: Client, number: int, schema: Any, tokens: int) -> dict[str, Any]:
    """What came of one schema: "refused", "cut off", "valid", "invalid" or "not judged", and the text."""
    try:
        reply = client.chat.completions.create(
            messages=[
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"Give an interesting example of this schema: {json.dumps(schema)}"},
            ],
            response_format={"type": "json_schema", "json_schema": {"name": "value", "schema": schema, "strict": True}},
            temperature=number % 2,
            seed=number,
            max_tokens=tokens,
        )
    except BadRequestError as error:
        return {"outcome": "refused", "error": error.message}
    choice = reply.choices[0]
    if choice.finish_reason != "stop":
        return {"outcome": "cut off", "text": choice.message.content}
    judge = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    try:
        valid = judge.is_valid(json.loads(choice.message.content))
    except ValueError:
        valid = False
    except re.error:  # a pattern of ECMA 262 that Python's `re`, with which jsonschema judges, does not know
        return {"outcome": "not judged", "text": choice.message.content}
    return {"outcome": "valid" if valid else "invalid", "text": choice.message.content}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--count", type=int, default=200, help="schemas that are served and can be judged")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--out", type=Path, default=RESULTS / "schemas.json")
    args = parser.parse_args()
    given, replies = schemas(), []
    with Client(args.model, max_batch=IN_FLIGHT) as client, ThreadPoolExecutor(IN_FLIGHT) as pool:
        while given and (missing := args.count - sum(reply["outcome"] in SERVED for reply in replies)) > 0:
            part, given, done = given[:missing], given[missing:], len(replies)
            found = pool.map(lambda i, each: ask(client, i, each[1], args.tokens), range(done, done + len(part)), part)
            replies += [{"about": about, **reply} for (about, _), reply in zip(part, found, strict=True)]
    counts = Counter(reply["outcome"] for reply in replies)
    print(dict(counts))
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(), "versions": versions(),
        "model": checkpoint_name(Path(args.model)), "counts": dict(counts), "replies": replies,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {args.out}")
    if counts["invalid"]:
        raise SystemExit("a reply that ended by itself is not valid under its schema")


if __name__ == "__main__":
    main()
