"""Show versions, devices, kernel backends, instruction sets in use, the cache directory and environment variables.

Add the output to a bug report."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

HELP = "show versions, devices, kernels and settings"

# cai_runtime reads these, or a library reads them and runs differently.
VARIABLES = (
    "CAI_HOME",
    "CAI_KERNELS",
    "CAI_NUM_THREADS",
    "CAI_CPU_ISA",
    "CAI_CUDA_ARCHS",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)
SECRETS = ("HF_TOKEN",)  # shown as "(set)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    found = environment()
    print(json.dumps(found, indent=2) if args.json else format_environment(found))
    return 0


def environment() -> dict[str, Any]:
    """The values that `cai env` shows. Imports torch."""
    from cai_runtime.bench.machine import describe_gpus, describe_machine, versions
    from cai_runtime.home import cai_home
    from cai_runtime.kernels.backend import describe_backends

    settings = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    settings |= {name: "(set)" for name in SECRETS if name in os.environ}
    return {
        "versions": versions(),
        "machine": describe_machine(),
        "gpus": describe_gpus(),
        "kernels": describe_backends(),
        "cache": str(cai_home()),
        "variables": settings,
    }


def format_environment(found: dict[str, Any]) -> str:
    machine = found["machine"]
    devices = {
        "cpu": f"{machine['cpu']}, {machine['usable_threads']} of {machine['cpu_threads']} threads, "
        f"{machine['memory_bytes'] / 2**30:.1f} GiB",
        **{
            f"cuda:{index}": f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.1f} GiB"
            for index, gpu in enumerate(found["gpus"])
        },
        "system": machine["system"],
    }
    sections = {
        "versions": {name: version or "not installed" for name, version in found["versions"].items()},
        "devices": devices,
        "kernels": found["kernels"],
        "cache": {"directory": found["cache"]},
        "variables": found["variables"] or {"": "none set"},
    }
    lines: list[str] = []
    for title, entries in sections.items():
        width = max(map(len, entries))
        lines += [title, *(f"  {name.ljust(width)}  {value}" for name, value in entries.items()), ""]
    return "\n".join(lines[:-1])
