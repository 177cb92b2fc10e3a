"""Compiles every Triton kernel ahead of time for GPUs that need not be there, and checks what came out.

    python -m cai_runtime.kernels.triton.aot [--targets sm_90,gfx942]

For each kernel and target it prints registers, spills and shared memory, and fails

- when a decode kernel spills, or shared memory exceeds what the architecture has;
- when the matrix products are not of the instructions that batch invariance rests on: m16n8k16 on NVIDIA, and for many rows
  on Hopper m64nNk16, which adds alike (Xie et al., MMA-Sim, arXiv:2511.10909); 16x16 on AMD;
- when a dot multiplies fewer columns than its operands' layout spreads over the lanes: Triton then multiplies some of them
  twice and others never;
- when kernels that must give the same bits, those of decode and of prefill, add columns in another order.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cai_runtime.kernels.triton.aot_cases import Case, cases
from cai_runtime.kernels.triton.launch import compile_options, interpreting

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DEPENDENT_TARGETS = {"sm_90", "sm_100", "sm_120"}  # those with programmatic dependent launch, see dependent.py
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}


@dataclass
class Outcome:
    registers: int
    spilled: int  # bytes of local memory a thread (NVIDIA), registers (AMD)
    shared: int  # bytes
    problems: list[str] = field(default_factory=list)
    orders: frozenset[tuple[str, int]] = frozenset()  # of the matrix products: dtype and `Dot.run`


@dataclass(frozen=True)
class Dot:
    """A matrix product of the matrix unit, as Triton lays it out (`tt.dot` of its GPU dialect)."""

    columns: int  # of the first operand, which are summed over
    dtype: str
    run: int  # consecutive columns that a lane holds, kWidth; four lanes hold a row, so an instruction takes 4 runs

    @property
    def fits(self) -> bool:
        return self.columns >= 4 * self.run


_DOT = re.compile(
    r"= tt\.dot [^\n]*?: tensor<\d+x(\d+)x(\w+), #ttg\.dot_op<\{opIdx = 0, parent = #\w+, kWidth = (\d+)\}>>"
)


# Of a warp group; its first operand in registers, or in shared memory.
_GROUP_DOT = re.compile(
    r"= ttng\.warp_group_dot [^\n]*?: (?:tensor|!ttg\.memdesc)<\d+x(\d+)x(\w+), "
    r"(?:#ttg\.dot_op<\{opIdx = 0, parent = #\w+, kWidth = (\d+)\}>|#shared)"
)


def dots(ttgir: str) -> set[Dot]:
    """The products of a kernel's GPU dialect. Products by fused multiply-add have no runs and are left out, as are those by
    tcgen05. From shared memory wgmma takes 16 columns of 16 bits side by side, as mma.sync does with runs of two."""
    found = {Dot(int(columns), dtype, int(run)) for columns, dtype, run in _DOT.findall(ttgir)}
    grouped = _GROUP_DOT.findall(ttgir)
    return found | {Dot(int(columns), dtype, int(run or 2)) for columns, dtype, run in grouped if dtype[-2:] == "16"}


def dot_problems(found: set[Dot]) -> list[str]:
    return [
        f"a dot over {d.columns} columns of {d.dtype} is laid out for {4 * d.run} (kWidth {d.run}): it multiplies some "
        "columns twice and others never; keep what its operand is made from in wider types"
        for d in sorted(found, key=str)
        if not d.fits
    ]


_GLOBAL_ACCESS = re.compile(
    r"\b(ld|st|red|atom)\.(volatile\.|relaxed\.\w+\.|acquire\.\w+\.)?global|cp\.async\.\w+\.shared"
)


def wait_problems(ptx: str) -> list[str]:
    """Of a kernel that starts while the one ahead of it ends: global memory before the wait, the next kernel before it."""
    wait, start = ptx.find("griddepcontrol.wait"), ptx.find("griddepcontrol.launch_dependents")
    access = _GLOBAL_ACCESS.search(ptx)
    problems = []
    if wait < 0 or start < wait:
        problems.append("it does not wait for the kernel ahead before it lets the next one start")
    if wait >= 0 and access is not None and access.start() < wait:
        problems.append("global memory is used before the wait for the kernel ahead")
    return problems


class Orders:
    """Whether cases of one `Case.same_bits` and target add in one order: the run of a lane decides which columns an
    instruction adds together."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], tuple[str, frozenset[tuple[str, int]]]] = {}

    def check(self, case: Case, target_name: str, outcome: Outcome) -> None:
        """Add a problem to the outcome if an earlier case added in another order."""
        if not case.same_bits:
            return
        name, orders = self._first.setdefault((case.same_bits, target_name), (case.name, outcome.orders))
        if orders != outcome.orders:
            outcome.problems.append(
                f"sums in another order than {name}: (dtype, kWidth) {sorted(outcome.orders)}, there {sorted(orders)}"
            )


def compile_case(case: Case, target_name: str) -> Outcome:
    """Compile one case for one target and read the result. Raises what the compiler raises."""
    target = TARGETS[target_name]
    names = case.kernel.arg_names
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        kind = case.types.get(name, "constexpr")
        signature[name] = kind.rstrip("!")
        if kind.endswith("!"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants, dependent = dict(case.constants), target_name in DEPENDENT_TARGETS
    if "DEPENDENT" in names:
        constants["DEPENDENT"] = dependent
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    options = compile_options(
        case.num_warps, case.num_stages, max_registers=case.max_registers, hip=target.backend == "hip"
    )
    options["enable_fp_fusion"] = case.fused
    if dependent and "DEPENDENT" in names:
        options["launch_pdl"] = True
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        outcome = _read_amd(case, compiled)
    else:
        outcome = _read_nvidia(case, compiled)
    found = dots(compiled.asm["ttgir"])
    outcome.orders = frozenset((d.dtype, d.run) for d in found)
    outcome.problems += dot_problems(found)
    if dependent and "DEPENDENT" in names:
        outcome.problems += wait_problems(compiled.asm["ptx"])
    if case.products and not case.fp32 and not case.int8 and not found:
        outcome.problems.append("no matrix product is found in Triton's GPU dialect, whose text may have changed")
    if outcome.spilled and case.decode:
        outcome.problems.append(f"a decode kernel spills ({outcome.spilled})")
    if outcome.shared > SHARED_BYTES[target_name]:
        limit = SHARED_BYTES[target_name]
        outcome.problems.append(f"{outcome.shared} bytes of shared memory, {target_name} has {limit}")
    return outcome


def _read_nvidia(case: Case, compiled: Any) -> Outcome:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    outcome = Outcome(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)
    ptx = compiled.asm["ptx"]
    if case.wide_loads:
        loads = re.findall(r"(ld\.global\S*|cp\.async\.c[ag]\.shared\.global [^,]*,[^,]*, 0x\w+)", ptx)
        wide = sum(load.endswith((".v4.b32", " 0x10")) for load in loads)
        if wide <= len(loads) - wide:
            outcome.problems.append(f"{wide} of {len(loads)} loads are of 16 bytes: weights are read in narrower ones")
    if case.int8:
        return outcome
    if not case.fused and "fma.rn.f32" in ptx:
        outcome.problems.append("products and sums are fused: results differ from the CPU's")
    grouped = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+(k\d+)\.f32", ptx))
    if "tcgen05" in ptx or grouped != ({"k16"} if case.warp_groups else set()):
        outcome.problems.append(f"wgmma of {sorted(grouped)}, or tcgen05: sums depend on the number of rows")
    if case.products:
        shapes = set(re.findall(r"[^w]mma\.sync\.aligned\.(m\d+n\d+k\d+)", ptx))
        wanted = set() if case.fp32 or case.warp_groups else {"m16n8k16"}
        if shapes != wanted:
            outcome.problems.append(f"matrix instructions {sorted(shapes)}, expected {sorted(wanted)}")
    return outcome


def _read_amd(case: Case, compiled: Any) -> Outcome:
    text = compiled.asm["amdgcn"]
    registers, spilled = (
        int(found.group(1)) if (found := re.search(rf"\.{name}:\s+(\d+)", text)) else -1
        for name in ("vgpr_count", "vgpr_spill_count")
    )
    outcome = Outcome(registers, spilled, compiled.metadata.shared)
    shapes = set(re.findall(r"v_mfma_\w+?_(\d+x\d+)x", text))
    if case.products and shapes != {"16x16"}:
        outcome.problems.append(f"matrix instructions {sorted(shapes)}, expected 16x16 alone")
    return outcome


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time and check the result.")
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"comma list of {', '.join(TARGETS)}")
    args = parser.parse_args(argv)
    targets = [t for t in args.targets.split(",") if t]
    unknown = [t for t in targets if t not in TARGETS]
    if unknown or not targets:
        parser.error(f"unknown target {', '.join(unknown) or '(none)'}; known: {', '.join(TARGETS)}")
    if interpreting():
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    failures, orders = 0, Orders()
    print(f"triton {triton.__version__}\n{'kernel':<52}{'target':<8}{'registers':>10}{'spilled':>9}{'shared':>9}")
    for case in cases():
        for target in [t for t in targets if t == "sm_90" or not case.warp_groups]:
            try:
                outcome = compile_case(case, target)
            except Exception as error:  # noqa: BLE001  # any compiler failure is a finding; the next case may pass
                failures += 1
                print(f"{case.name:<52}{target:<8}  does not compile: {type(error).__name__}: {error}", flush=True)
                continue
            orders.check(case, target, outcome)
            failures += bool(outcome.problems)
            note = "".join(f"  FAIL: {p}" for p in outcome.problems)
            row = f"{outcome.registers:>10}{outcome.spilled:>9}{outcome.shared:>9}"
            print(f"{case.name:<52}{target:<8}{row}{note}", flush=True)
    print(f"{failures} failed" if failures else "all compiled as they should")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
