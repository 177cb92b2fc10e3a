"""Runs all checks and measurements that need a GPU, in two calls of five minutes:

    python benchmarks/gpu_suite.py --call 1   # correctness, and where the time goes
    python benchmarks/gpu_suite.py --call 2   # engines, single linears, tiles, sanitizers, all tests
        [--only SECTION,...] [--minutes 5.3] [--out FOLDER] [--dry-run]

Each section runs in a process of its own with a time limit. A hang, or an error that makes the GPU unusable, ends only that
section. FOLDER/gpu_suite_<call>_<device>_<date>.json is written after every section, with all findings up to a failure.
FOLDER also gets the sections' whole output (.log), timeline.json, ncu.csv and the tuned tiles: fewer than eight files.
Figures come with their predictions of gpu/predicted.json.

A bare machine takes missing packages and libraries from .gpu/kit, which gpu_prepare.py makes. Without the kit the CUDA
library is built, if apache-tvm-ffi is installed. Without a GPU, or with --dry-run, the CPU rehearses the sections at tiny
shapes: Triton interpreted, the CUDA kernels emulated (or left out, with --no-emulation). Exit status: 0; 1 if a section
failed; 2 without a GPU."""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH omits it

from gpu import environment
from gpu.context import REAL, REHEARSAL, Context
from gpu.report import Findings, Report

RESULTS = environment.ROOT / "benchmarks/results"


def unused(path: Path) -> Path:
    """`path`, with a number appended if the file exists."""
    several = (path.with_stem(f"{path.stem}_{n}") for n in range(2, 1000))
    return next(p for p in (path, *several) if not p.exists())


def context_of(args: argparse.Namespace) -> Context:
    """The sizes and the device to run at. In a dry run, also prepares the rehearsal."""
    if args.dry_run:
        from gpu import rehearsal

        rehearsal.prepare(emulate_cuda=not args.no_emulation)
        return Context(REHEARSAL, "cpu", args.report, args.out)
    return Context(REAL, "cuda", args.report, args.out)


def run_section(args: argparse.Namespace) -> int:
    """Run a section in its own process and write its findings to a file."""
    from gpu.sections import SECTIONS

    findings = Findings(args.findings, args.until)
    try:
        SECTIONS[args.section].run(findings, context_of(args), args.until)
    except Exception as error:  # noqa: BLE001  # the findings so far are written
        traceback.print_exc()
        findings.problem(f"{type(error).__name__}: {str(error)[:600]}")
    findings.write()
    return 1 if findings.problems else 0


def run_program(args: argparse.Namespace) -> int:
    """Run a program that a section starts in a process of its own, such as under ncu."""
    from gpu import counters, decode

    name, *details = args.program.split(",")
    context = context_of(args)
    if name == "warm":
        with tempfile.TemporaryDirectory() as folder:
            decode.warm(Findings(Path(folder) / "warm.json", time.time() + 3600), context, *details)
    else:
        {"counted": counters.counted, "small": counters.small}[name](context)
    return 0


def gpu_name() -> str | None:
    """The GPU's name, from a process of its own, so that this one takes no GPU memory."""
    program = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip().replace(" ", "-") or None


def print_tables(report: Report) -> None:
    from gpu import decode, linears

    for name, table in (("many", linears.table), ("linears", linears.table), ("decode", decode.table)):
        items = report.sections.get(name, {}).get("items")
        if items:
            print(f"\n{name}\n{table(items)}")


def run_suite(args: argparse.Namespace, names: list[str], gpu: str | None) -> int:
    from gpu.sections import SECTIONS

    call = f"call{args.call}" if not args.only else "some"
    stem = f"gpu_suite_{call}_{gpu or 'rehearsal'}_{datetime.date.today().isoformat()}.json"
    path = unused(args.out / stem)
    report = Report(path, time.monotonic() + args.minutes * 60, environment.describe(), path.with_suffix(".log"))
    report.about = {"call": args.call, "rehearsal": gpu is None, "command": sys.argv[1:], "used": environment.use_kit()}
    print(f"{report.environment}\n{report.about}", flush=True)
    report.write()
    common = ["--report", str(path), "--out", str(args.out)]
    common += ["--dry-run"] if args.dry_run else []
    common += ["--no-emulation"] if args.no_emulation else []
    for name in names:
        before = environment.gpu_state()

        def command(findings: Path, until: float, name: str = name) -> list[str]:
            own = ["--section", name, "--findings", str(findings), "--until", str(until)]
            return [sys.executable, str(Path(__file__).resolve()), *own, *common]

        report.section(name, SECTIONS[name].limit * (10 if args.dry_run else 1), command)
        report.sections[name]["gpu"] = {"before": before, "after": environment.gpu_state()}
        report.write()
    print_tables(report)
    print(f"\nwritten to {path}\nfailed: {', '.join(report.failed) or 'nothing'}")
    if gpu is None:
        print("this was a rehearsal on the CPU: its figures mean nothing", file=sys.stderr)
        return 1 if report.failed else 2
    return 1 if report.failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--call", type=int, choices=(1, 2), default=1, help="which half (default: 1)")
    parser.add_argument("--only", default="", metavar="SECTION,...", help="run only these sections, of either call")
    parser.add_argument("--minutes", type=float, default=None, help="limit of the whole run (default: 5.3)")
    out = os.environ.get("OUT")
    parser.add_argument(
        "--out", type=Path, default=Path(out) if out else RESULTS, help="folder for results (default: $OUT)"
    )
    parser.add_argument("--dry-run", action="store_true", help="rehearse the sections on the CPU")
    parser.add_argument("--no-emulation", action="store_true", help="rehearse without the CUDA kernels")
    parser.add_argument("--list", action="store_true", help="list the sections and their questions")
    for internal, kind in (("section", str), ("program", str), ("findings", Path), ("report", Path), ("until", float)):
        parser.add_argument(f"--{internal}", type=kind, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.report = args.report or args.out / "none.json"
    environment.use_kit()
    with tempfile.TemporaryDirectory() as folder:
        environment.make_importable(Path(folder))
        environment.name_a_cache()
        from gpu.sections import SECTIONS, names_of_call

        if args.list:
            for name, section in SECTIONS.items():
                calls = " and ".join(map(str, section.calls)) or "-"
                print(f"{name:<18} call {calls:<8} {section.limit:>4.0f} s  {section.asks}")
            return 0
        if args.section:
            return run_section(args)
        if args.program:
            return run_program(args)
        names = args.only.split(",") if args.only else names_of_call(args.call)
        unknown = sorted(set(names) - set(SECTIONS))
        if unknown:
            parser.error(f"unknown section {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
        gpu = None if args.dry_run else gpu_name()
        if gpu is None:
            args.dry_run = True
            names = [n for n in (names if args.only else SECTIONS) if SECTIONS[n].rehearsed]
        if args.minutes is None:
            args.minutes = 60.0 if args.dry_run else 5.3
        return run_suite(args, names, gpu)


if __name__ == "__main__":
    sys.exit(main())
