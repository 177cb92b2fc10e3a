"""Attention without a causal limit, as an encoder-decoder has it: `python benchmarks/full_attention.py [--heads N,N]
[--windows N,N] [--threads N] [--seconds S] [--isa NAME] [--out FILE]`.

    encoder  all positions of windows of 1,500 attend to one another; beside torch's scaled_dot_product_attention in fp32 on
             contiguous tensors. GFLOP/s: four operations per head, dimension and pair of positions / median time.
    cross    a decode step: one query each of 1 sequence, of 5 beams of one window, and of 5 beams each of 8 windows, over
             pages in fp32, bf16 and fp16. GB/s: bytes of the keys and values of all windows, once / median time.
    write    microseconds for the keys and values of one window into pages.

Heads have 64 dimensions. Sets of pages rotate, so that no call finds its keys in a processor cache (`bench/timing.py`).
Writes benchmarks/results/full_attention.json with machine, date, read bandwidth and matrix rate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cai_runtime.bench.machine import describe_machine, versions
from cai_runtime.bench.roofs import measure_roofs
from cai_runtime.bench.timing import Schedule, interleaved, make_clock, rotation, thread_count
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.attention import HeadLayout
from cai_runtime.kernels.batch import AttentionBatch, PageTable
from cai_runtime.layers.ops import make_ops

RESULTS = Path(__file__).parent / "results"
ROWS, DIM, PAGE, SCALE = 1500, 64, 16, 0.125
STEPS = {"1 sequence": (1, 1), "5 beams of a window": (1, 5), "5 beams each of 8 windows": (8, 5)}
CPU = torch.device("cpu")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def encoder(heads: int, windows: int, schedule: Schedule) -> dict[str, Any]:
    layout = HeadLayout(heads, heads, DIM, 0)
    ours = make_ops("cpu", CPU).encoder_attention(layout, ROWS)
    qkv = torch.randn(windows * ROWS, layout.qkv_width)
    q, k, v = (part.contiguous() for part in qkv.view(windows, ROWS, 3, heads, DIM).permute(2, 0, 3, 1, 4))

    def theirs() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)

    expected = theirs().transpose(1, 2).reshape(len(qkv), -1)
    assert float((ours(qkv, SCALE) - expected).norm() / expected.norm()) < 1e-5
    clocks = [make_clock([lambda: ours(qkv, SCALE)], "cpu"), make_clock([theirs], "cpu")]
    mine, torchs = (t.median for t in interleaved(clocks, schedule))
    flops = 4 * ROWS * ROWS * DIM * heads * windows
    return {
        "part": "encoder", "heads": heads, "windows": windows, "ms": 1e3 * mine, "gflop_per_s": flops / mine / 1e9,
        "torch_ms": 1e3 * torchs, "speedup": torchs / mine,
    }  # fmt: skip


def cross(heads: int, dtype: torch.dtype, schedule: Schedule) -> Iterator[dict[str, Any]]:
    layout, ops, each = HeadLayout(heads, heads, DIM, 0), make_ops("cpu", CPU), -(-ROWS // PAGE)
    windows = max(n for n, _ in STEPS.values())
    held = windows * each * ops.page_bytes(PAGE, layout, dtype)
    (sets,) = rotation([held], "cpu")
    sets = min(sets, max(2, (1 << 30) // held))
    caches = [ops.kv_cache(layout, windows * each, PAGE, dtype) for _ in range(sets)]
    layers = [ops.cross_attention(layout, cache, ROWS, "encoder") for cache in caches]
    pages = torch.randperm(windows * each).view(windows, each).int()
    kv = torch.randn(windows * ROWS, 2 * layout.query_width)
    for layer in layers:
        layer.write(kv, pages)

    def batch(first: int, count: int, beams: int) -> AttentionBatch:
        its = pages[torch.arange(first, first + count).repeat_interleave(beams)].contiguous()
        rows = count * beams
        zeros, starts = torch.zeros(rows, dtype=torch.int32), torch.arange(rows + 1, dtype=torch.int32)
        return AttentionBatch(zeros, starts, zeros + 1, {"encoder": PageTable(zeros[:0], its)})

    def calls(count: int, beams: int) -> list[Callable[[], Any]]:
        q = torch.randn(count * beams, layout.query_width)
        batches = [batch(first, count, beams) for first in range(0, windows, count)]
        return [lambda a=layer, b=its: a(q, b, SCALE) for layer in layers for its in batches]

    writes = [lambda a=layer: a.write(kv, pages) for layer in layers]
    clocks = [make_clock(c, "cpu") for c in [*(calls(*step) for step in STEPS.values()), writes]]
    *steps, write = (t.median for t in interleaved(clocks, schedule))
    for (name, (count, _)), seconds in zip(STEPS.items(), steps, strict=True):
        nbytes = count * ROWS * 2 * layout.query_width * dtype.itemsize
        yield {
            "part": "cross", "heads": heads, "cache": str(dtype).removeprefix("torch."), "step": name,
            "us": 1e6 * seconds, "gb_per_s": nbytes / seconds / 1e9,
        }  # fmt: skip
    yield {"part": "write", "heads": heads, "cache": str(dtype).removeprefix("torch."), "us": 1e6 * write / windows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=numbers, default=[6, 8, 12], help="heads of a layer (default: Whisper's)")
    parser.add_argument("--windows", type=numbers, default=[1, 8], help="windows of an encoder's call")
    parser.add_argument("--threads", type=int, help="default: all that this process may use")
    parser.add_argument("--seconds", type=float, default=0.5, help="timed calls of each contender")
    parser.add_argument("--isa", choices=cpu_library.instruction_sets(), help="default: the best")
    parser.add_argument("--out", type=Path, default=RESULTS / "full_attention.json")
    options = parser.parse_args()
    if options.isa:
        cpu_library.use_instruction_set(options.isa)
    schedule, results = Schedule(seconds=options.seconds), []
    with thread_count(options.threads) as threads, torch.inference_mode():
        roofs = measure_roofs("cpu")
        print(json.dumps(roofs.to_json()))
        for heads in options.heads:
            results += [encoder(heads, windows, schedule) for windows in options.windows]
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                results += cross(heads, dtype, schedule)
            for row in results:
                if row["heads"] == heads:
                    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": versions(),
        "isa": cpu_library.instruction_set(),
        "threads": threads,
        "roofs": roofs.to_json(),
        "results": results,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
