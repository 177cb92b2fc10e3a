"""What the CUDA decode kernels are compiled to, and how launches of real shapes are cut: what can be said without a GPU.

    python benchmarks/gpu_code.py [--arch 90a] [--json FILE]

Needs nvcc, and Triton for its disassembler. The first table: of every kernel the registers of a thread, and the instructions
that its main loop has for 1 KiB of weights, beside those that a multiprocessor can start in the time in which memory brings
1 KiB. The second: of every launch of a layer of Llama-3.1-8B at keep 0.5, by rows of x, how many tiles there are for each
multiprocessor, the blocks of a cluster, a block's shared memory, and the bytes of weights under way at once. The third: of
the kernels for many rows the registers at the launch, those spilled, and the instructions for each product of a warp
group."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH omits it

from gpu.launch_plan import launches, many_launches, table_of_launches
from gpu.machine_code import decode_kernels, many_kernels

ROOT = Path(__file__).resolve().parents[1]
MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 3.0e12  # of an H100: hertz, bytes a second that a copy reaches
STARTS = 4  # instructions that a multiprocessor can start in a cycle
TYPES = ("bf16", "fp16")


def compiled(arch: str, folder: Path, source: str) -> tuple[Path, dict[str, int], dict[str, int]]:
    """The cubin of a source, and the registers and spilled bytes of its kernels by mangled name."""
    cubin = folder / f"{source}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
    command += [
        "-gencode",
        f"arch=compute_{arch},code=sm_{arch}",
        str(ROOT / f"csrc/cuda/{source}.cu"),
        "-o",
        str(cubin),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"nvcc failed:\n{done.stderr}")
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = re.findall(pattern, done.stderr, re.DOTALL)
    return cubin, {name: int(used) for name, _, used in found}, {name: int(spilled) for name, spilled, _ in found}


def kernels(arch: str) -> list[dict[str, object]]:
    room = STARTS * 1024 * MULTIPROCESSORS * CLOCK / BANDWIDTH
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in TYPES:
            cubin, registers, _ = compiled(arch, Path(folder), f"linear_{kind}")
            for kernel in decode_kernels(cubin):
                counts = kernel.counts()
                rows.append({
                    "kernel": kernel.name, "rows": kernel.rows, "registers": registers[kernel.mangled],
                    "instructions_per_kib": kernel.hot_per_kib, "of_room": round(kernel.hot_per_kib / room, 2),
                    "products": counts["HMMA"], "shared_loads": counts["LDS"],
                })  # fmt: skip
    return rows


def kernels_of_many(arch: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in TYPES:
            cubin, registers, spilled = compiled(arch, Path(folder), f"many_{kind}")
            rows += [
                {
                    "kernel": k.name, "rows": k.rows, "split": k.split, "registers": registers[k.mangled],
                    "spilled_bytes": spilled[k.mangled], "instructions_per_product": k.per_product,
                }
                for k in many_kernels(cubin)
            ]  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="90a", help="default: 90a")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the tables there, too")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc is not installed")
    code, plans = kernels(args.arch), launches(MULTIPROCESSORS)
    print(f"{'kernel':<34}{'rows':>5}{'registers':>11}{'instructions/KiB':>18}{'of room':>9}{'HMMA':>6}{'LDS':>5}")
    for row in sorted(code, key=lambda r: (str(r["kernel"]), str(r["rows"]))):
        print(
            f"{row['kernel']:<34}{row['rows']:>5}{row['registers']:>11}{row['instructions_per_kib']:>18}{row['of_room']:>9}"
            f"{row['products']:>6}{row['shared_loads']:>5}"
        )
    print("\n" + table_of_launches(plans))
    many = kernels_of_many(args.arch)
    print(
        f"\n{'kernel for many rows':<34}{'rows':>5}{'split':>6}{'registers':>11}{'spilled':>9}{'instructions/product':>22}"
    )
    for row in sorted(many, key=lambda r: (str(r["kernel"]), str(r["rows"]), str(r["split"]))):
        print(
            f"{row['kernel']:<34}{row['rows']:>5}{'yes' if row['split'] else 'no':>6}{row['registers']:>11}"
            f"{row['spilled_bytes']:>9}{row['instructions_per_product'] or '-':>22}"
        )
    if args.json is not None:
        tables = {"kernels": code, "launches": plans, "many_kernels": many}
        tables["many_launches"] = many_launches(MULTIPROCESSORS)
        lines = [f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in tables.items()]
        args.json.write_text(f'{{\n"arch": "{args.arch}",\n' + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
