"""List the catalogue and the models on this machine, fetched ones and those of `cai demo`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "list the catalogue and the models on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the API's objects, with the `path` of local ones")


def run(args: argparse.Namespace) -> int:
    from cai_runtime.cli.options import demo_checkpoints, fetched_models
    from cai_runtime.client import Client
    from cai_runtime.convert.named import NAMED
    from cai_runtime.home import cai_home
    from cai_runtime.tables import aligned

    local = {**fetched_models(), **{path.parent.name: path for path in demo_checkpoints()}}
    with Client(models=local) as client:
        entries = client.models.list().data

    def place(name: str) -> Path | None:
        catalogued = cai_home() / "models" / name
        return local.get(name) or (catalogued if (catalogued / "config.json").is_file() else None)

    if args.json:
        print(
            json.dumps([{**e.model_dump(), "path": str(p) if (p := place(e.id)) else None} for e in entries], indent=2)
        )
        return 0
    table = [("model", "owner", "parameters", "on this machine")]
    for entry in entries:
        path = place(entry.id)
        size = str((entry.model_extra or {}).get("parameters_number", ""))
        table.append((entry.id, entry.owned_by, size, str(path) if path else "no"))
    print("\n".join(aligned(table, right=(2,))))
    missing = [name for name, named in NAMED.items() if named.kind == "model" and name not in local]
    if missing:
        print(f"\nto fetch with `cai pull NAME`: {', '.join(missing)}")
    return 0
