"""What the Triton kernels compiled for Hopper compute, executed on the CPU: errors against float64, by store and dtype.

    python benchmarks/gpu_compiled.py [--sampled ROWS] [--json FILE]

Needs a checkout and Triton, and no GPU: tests/kernels/ptx interprets the compiled code. The cases are those of
tests/kernels/test_triton_compiled.py. `relative` is the norm of the error over that of the result, `of bound` the largest
error of an element over what its roundings allow. The sampler's tokens are compared with the reference's, --sampled of them
(default: 640; a second for every sixteen). FILE keeps the tables of other versions of Triton."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests/kernels"
sys.path[:0] = [str(ROOT), str(TESTS), str(TESTS / "helpers")]  # PYTHONSAFEPATH omits them

SAMPLED_ROWS, VOCABULARY = 64, 1000  # of a batch


class Table:
    """The rows of the table: a case's kernel, store or shape, dtype, and how far it is off."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def run(self, tests: Any, case: tuple[str, str, str], test: Callable[[], None]) -> None:
        """Run a test whose checks note what they find."""
        from error_bounds import worst_case

        relative, of_bound = 0.0, 0.0

        def check(got: Any, within: Callable[..., Any], **_: Any) -> None:
            nonlocal relative, of_bound
            bound = within(worst_case)
            error = (got.double() - bound.value).abs()
            relative = max(relative, float(error.norm() / bound.value.norm()))
            of_bound = max(of_bound, float((error / bound.error.clamp_min(1e-300)).max()))

        tests.check = check
        test()
        self.rows.append(dict(zip(("kernel", "what", "dtype"), case, strict=True)) | {
            "relative": float(f"{relative:.2e}"), "of_bound": round(of_bound, 3), "right": of_bound <= 1,
        })  # fmt: skip
        print("{kernel:<12}{what:<36}{dtype:<10}{relative:>10.1e}{of_bound:>10.3f}".format(**self.rows[-1]), flush=True)


def kernels(monkeypatch: Any) -> list[dict[str, Any]]:
    import test_triton_compiled as tests
    import torch
    from ptx.device import put_in_place

    device = put_in_place(monkeypatch)
    table = Table()

    def run(kernel: str, what: str, dtype: Any, test: Callable[..., None], *arguments: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        device.launches.clear()
        name = str(dtype).removeprefix("torch.")
        table.run(tests, (kernel, what, name), lambda: test(generator, *arguments))

    for dtype in tests.DTYPES:
        for store in tests.STORES:
            for prologue in ("none", "norm", "gate"):
                what = store if prologue == "none" else f"{store}, {prologue}"
                run("linear", what, dtype, tests.test_linear, store, dtype, prologue)
        run("linear", "int8, int8 activations", dtype, tests.test_int8_activations, device, dtype)
        for int8, cache in ((False, ""), (True, ", int8 cache")):
            for heads, sinks, kind in ((tests.PLAIN, False, "plain"), (tests.WINDOWED, True, "window, sinks")):
                for sequences, step in ((tests.DECODE, "decode"), (tests.PREFILL, "prefill")):
                    with monkeypatch.context() as patch:
                        given = (patch, device, sequences, heads, sinks, dtype, int8)
                        run("attention", f"{step}, {kind}{cache}", dtype, tests.test_attention, *given)
                if dtype != torch.float32:
                    with monkeypatch.context() as patch:
                        wide = tests.WIDE if sinks else heads  # wgmma is taken for 64 and 128 dimensions
                        given = (patch, device, wide, sinks, dtype, int8)
                        run("attention", f"many, {kind}{cache}", dtype, tests.test_attention_of_many_tokens, *given)
        run("rows", "norms, swiglu", dtype, tests.test_norms_and_swiglu, dtype, (2, 576))
        run("rope", "with norms of heads", dtype, tests.test_rope_and_kv_write, dtype, 64, 64, True)
    return table.rows


def sampler(monkeypatch: Any, rows: int) -> dict[str, Any]:
    import numpy as np
    import torch
    from ptx.device import put_in_place
    from sampling_cases import make_batch

    from cai_runtime.kernels.sampling import sample_cpu
    from cai_runtime.kernels.sampling_reference import sample_reference
    from cai_runtime.kernels.triton.sampling import TritonSampler

    put_in_place(monkeypatch)
    pairs = different = scored = unequal = 0
    for seed in range(-(-rows // SAMPLED_ROWS)):
        logits, batch = make_batch(np.random.default_rng(seed), SAMPLED_ROWS, VOCABULARY)
        wanted, cpu = sample_reference(logits, batch), sample_cpu(logits.copy(), batch)
        found = TritonSampler(torch.device("cpu"))(torch.from_numpy(logits.copy()), batch).wait()
        pairs += SAMPLED_ROWS
        different += int(((found.ids != wanted.ids) | (found.status != wanted.status)).sum())
        if found.logprobs is not None and cpu.logprobs is not None:
            scored += int(np.isfinite(cpu.logprobs).sum())
            unequal += int((np.isfinite(cpu.logprobs) & (found.logprobs != cpu.logprobs)).sum())
        if sys.stderr.isatty():
            print(f"\r{pairs} rows sampled", end="", file=sys.stderr, flush=True)
    of_logprobs = {"logprobs": scored, "unequal_logprobs": unequal}
    return {"rows": pairs, "different": different, "vocabulary": VOCABULARY, **of_logprobs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sampled", type=int, default=640, metavar="ROWS", help="rows to sample (default: 640)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the table there, too")
    args = parser.parse_args()
    import pytest
    import torch
    import triton

    started = time.monotonic()
    with pytest.MonkeyPatch.context() as monkeypatch:
        rows, sampled = kernels(monkeypatch), sampler(monkeypatch, args.sampled)
    print(f"\nsampler: {sampled['rows']} rows, {sampled['different']} differ from the reference")
    print(f"logprobs of {sampled['logprobs']} rows, {sampled['unequal_logprobs']} differ from the CPU's in any bit")
    wrong = [r for r in rows if not r["right"]]
    took = time.monotonic() - started
    print(f"Triton {triton.__version__}: {len(rows)} cases, {len(wrong)} beyond their bounds, {took:.0f} s")
    if args.json is not None:
        kept = json.loads(args.json.read_text()) if args.json.exists() else {}
        kept[triton.__version__] = {"torch": torch.__version__, "target": "sm_90", "sampler": sampled, "cases": rows}
        args.json.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    return 1 if wrong or sampled["different"] or sampled["unequal_logprobs"] else 0


if __name__ == "__main__":
    sys.exit(main())
