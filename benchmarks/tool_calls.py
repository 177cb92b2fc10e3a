"""Asks a model 100 questions with ten tools: `python benchmarks/tool_calls.py [MODEL] [--only auto,required] [--out FILE]`.

    auto        how often it calls a tool at all, the right one, with arguments valid under its schema, with the values that
                the question names.
    required    the same, where the grammar enforces a call: every one must be valid.

MODEL: a directory, or a name that `cai pull` knows, by default qwen2.5-coder-0.5b-instruct. All texts are greedy. Writes
benchmarks/results/tool_calls.json with machine and date, the calls included. Fails if a required call is not valid.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from cai_runtime import Client
from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.cli.options import checkpoint_name

RESULTS = Path(__file__).parent / "results"
QUESTIONS = Path(__file__).parent / "tool_questions.json"
IN_FLIGHT = 16


def schema_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, as tool_questions.json abbreviates it."""
    required = [name for name in tool["parameters"] if name not in tool.get("optional", ())]
    return {"type": "object", "properties": tool["parameters"], "required": required, "additionalProperties": False}


def is_named(expected: Any, given: Any) -> bool:
    """Whether an argument has the value that the question names: texts contain it in any case."""
    if isinstance(expected, str):
        return expected.lower() in str(given).lower()
    return bool(expected == given)


def judge(message: Any, question: Mapping[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    """What the reply's first call is."""
    found: dict[str, Any] = {"question": question["ask"], "called": bool(message.tool_calls)}
    if not message.tool_calls:
        return {**found, "content": message.content}
    call = message.tool_calls[0].function
    found |= {"name": call.name, "arguments": call.arguments, "is_right_tool": call.name == question["tool"]}
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        return {**found, "is_valid": False, "has_values": False}
    is_valid = call.name in schemas and Draft202012Validator(schemas[call.name]).is_valid(arguments)
    has_values = (
        is_valid
        and found["is_right_tool"]
        and all(is_named(v, arguments.get(k)) for k, v in question["values"].items())
    )
    return {**found, "is_valid": is_valid, "has_values": has_values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--only", default="auto,required")
    parser.add_argument("--count", type=int, default=None, help="ask only the first so many questions")
    parser.add_argument("--out", type=Path, default=RESULTS / "tool_calls.json")
    args = parser.parse_args()
    known = json.loads(QUESTIONS.read_text())
    schemas = {tool["name"]: schema_of(tool) for tool in known["tools"]}
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool["name"], "description": tool["description"],
                "parameters": schemas[tool["name"]], "strict": True,
            },
        }
        for tool in known["tools"]
    ]  # fmt: skip
    questions = known["questions"][: args.count]
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(), "versions": versions(),
        "model": checkpoint_name(Path(args.model)), "questions": len(questions),
    }  # fmt: skip
    with Client(args.model, max_batch=IN_FLIGHT) as client, ThreadPoolExecutor(IN_FLIGHT) as pool:
        for choice in args.only.split(","):

            def ask(question: Mapping[str, Any], choice: str = choice) -> dict[str, Any]:
                reply = client.chat.completions.create(
                    messages=[{"role": "user", "content": question["ask"]}],
                    tools=tools,
                    tool_choice=choice,
                    parallel_tool_calls=False,
                    temperature=0,
                    max_tokens=200,
                )
                return judge(reply.choices[0].message, question, schemas)

            replies = list(pool.map(ask, questions))
            counts = {
                name: sum(bool(reply.get(name)) for reply in replies)
                for name in ("called", "is_right_tool", "is_valid", "has_values")
            }
            found[choice] = {**counts, "replies": replies}
            print(f"{choice}: of {len(questions)}", counts, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {args.out}")
    if "required" in found and found["required"]["is_valid"] < len(questions):
        raise SystemExit("a call that the grammar enforces is not valid")


if __name__ == "__main__":
    main()
