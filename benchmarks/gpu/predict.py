"""Predicts the CUDA decode kernel's launches and steps at Llama-3.1-8B's shapes, before a GPU has measured them.

    python benchmarks/gpu/predict.py [--write]

--write puts them into predicted.json, beside which the suite puts what it measures. How launches are cut is the library's
own plan (needs nvcc). A launch takes what is fixed, and the reading of its weights as far as it was not done before: the
first 64 KiB of a block are on their way while the kernel ahead ends. Reading is bound by memory, or by the busiest
multiprocessor: by its port to the second-level cache, by the instructions it can start, or by the chain of products of its
warps. With more than 16 rows a launch is bound by memory, by what the second-level cache gives, or by the tensor cores of
the busiest multiprocessor. All constants are estimates."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # PYTHONSAFEPATH omits it

from gpu.context import END_STORES
from gpu.launch_plan import FUSED_GATES, HEAD, LAYER, launches, many_launches

PREDICTED = Path(__file__).with_name("predicted.json")
MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 3.0e12
PORT = 64  # bytes a cycle from the second-level cache to a multiprocessor
STARTED = 2.6  # instructions a cycle that such code starts, of 4
# By store: bytes of a weight; instructions for 1 KiB and cycles that a warp takes for it (gpu_code.py; the latter from the
# latencies of loads from shared memory and of eight, four or two products in a chain).
STORES = {"bf16": (2, 71, 110), "int8": (1, 129, 190), "int4/128": (0.5 + 2 / 128, 170, 330)}
WARPS = 8
# Microseconds. The end of the kernel ahead is seen, x is staged, the last tile's sums are added and stored.
FIXED, NORM, GATE, CLUSTER = 2.0, 0.2, 0.4, 0.4
OVERLAP = 1.0  # of reading, while the kernel ahead ends
SMALL, ATTENTION, MERGE = 2.2, 6.2, 2.2  # a small kernel; attention of one row at context 1024 and its merge
LAYERS, CONTEXT = 32, 1024
# Many rows. Products of 16-bit numbers that a multiprocessor makes in a cycle, the part of that which such loops reach, what
# the second-level cache gives all of them together, and cycles from a tile's last product to the next one's first.
PRODUCTS, REACHED, CACHE, EPILOGUE = 2048, 0.7, 5.5e12, 2500
EIGHTS, FOURS = 15, 32  # clusters of so many multiprocessors that the device has
CUBLAS = 700e12  # operations a second of dense bf16, of many rows


def plain(store: str) -> str:
    """Of the names in STORES, without the group."""
    return store.split("/")[0]


def launch_microseconds(cut: dict[str, Any]) -> float:
    per_weight, instructions, cycles = STORES[cut["store"]]
    nbytes = cut["weights"] * per_weight
    slower = 1.2 if cut["rows"] > 8 else 1.0
    rate = min(PORT, 1024 * STARTED / instructions, WARPS * 1024 / (cycles * slower)) * CLOCK  # of a multiprocessor
    busiest = nbytes * cut["rounds"] / cut["tiles"]
    reading = max(nbytes / BANDWIDTH, busiest / rate) * 1e6
    ahead = min(cut["blocks"] * cut["bytes_under_way"], nbytes) / BANDWIDTH * 1e6
    fixed = FIXED + NORM * (cut["prologue"] == 1) + GATE * (cut["prologue"] == 2) + CLUSTER * (cut["cluster"] > 1)
    return fixed + reading - min(ahead, OVERLAP)


def many_microseconds(cut: dict[str, Any]) -> float:
    """Of a launch for many rows of x."""
    per_weight, high, split = STORES[cut["store"]][0], cut["rows_of_block"], cut["split"]
    # Bytes that the second-level cache gives for an item. Four blocks share an item of four times the products.
    item = (1 if split else 2) * cut["columns"] * 128 * per_weight + (1 if split else 2) * cut["columns"] * high * 2
    units = EIGHTS * 2 if split else FOURS  # that run at once: two blocks that divide the columns to a multiprocessor
    rounds = -(-cut["items"] // units)
    rate = PRODUCTS * REACHED * (4 if split else 1)  # a cycle, for an item or a block
    tensor = rounds * (128 * high * cut["columns"] / rate + EPILOGUE / (2 if split else 1)) / CLOCK
    cache = cut["items"] * item / CACHE
    return FIXED + CLUSTER * split + max(cut["weights"] * per_weight / BANDWIDTH, cache, tensor) * 1e6


def rows_microseconds(rows: int, columns: int, gated: bool) -> float:
    """Of a kernel that reads rows of x, twice as wide where they are gated, and writes rows: a norm, a gate, into panels."""
    return SMALL + rows * columns * (6 if gated else 4) / (0.8 * BANDWIDTH) * 1e6


def many_predictions() -> list[dict[str, Any]]:
    """Milliseconds of the linears of all layers with their norms and gates, by rows, beside dense bf16 by cuBLAS."""
    found = []
    for rows in (64, 256, 2048, 4096):
        by_store: dict[str, float] = defaultdict(float)
        for cut in many_launches(MULTIPROCESSORS, rows=(rows,)):
            by_store[cut["store"]] += many_microseconds(cut)
            if cut["launch"].endswith("0"):
                by_store[cut["store"]] += rows_microseconds(rows, cut["columns"], "down" in cut["launch"])
        dense = 0.0
        for inputs, outputs, prologue in LAYER.values():
            weights = inputs * sum(outputs)
            dense += FIXED + max(weights * 2 / (0.9 * BANDWIDTH), 2 * weights * rows / CUBLAS) * 1e6
            dense += rows_microseconds(rows, inputs, prologue == 2) if prologue else 0.0
        for store, microseconds in by_store.items():
            found.append({
                "backend": "cuda", "weights": f"interpolative {plain(store)}", "rows": rows,
                "linears_milliseconds": round(microseconds * LAYERS / 1e3, 2),
                "dense_cublas_milliseconds": round(dense * LAYERS / 1e3, 2), "of_dense": round(dense / microseconds, 2),
            })  # fmt: skip
    return found


def predictions() -> dict[str, list[dict[str, Any]]]:
    many = many_predictions()
    steps, single = [], []
    heads = {(c["store"], c["rows"]): c for c in launches(MULTIPROCESSORS, None, (1, 16), HEAD)}
    heads |= {(c["store"], c["rows"]): c for c in many_launches(MULTIPROCESSORS, None, (64,), HEAD)}
    for keep, kind in ((0.5, "interpolative"), (None, "dense")):
        by_launch: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
        weight_bytes: dict[str, float] = defaultdict(float)
        for cut in launches(MULTIPROCESSORS, keep, rows=(1, 16)):
            by_launch[cut["store"], cut["rows"]][cut["launch"]] = round(launch_microseconds(cut), 1)
            weight_bytes[cut["store"]] += cut["weights"] * STORES[cut["store"]][0] * (cut["rows"] == 1)
        for (store, rows), found in by_launch.items():
            if kind == "dense" and store == "int8":
                continue  # the suite has no such model
            name = {"backend": "cuda", "weights": f"{kind} {plain(store)}", "rows": rows}
            steps.append(
                name | step(sum(found.values()), weight_bytes[store], heads[END_STORES[plain(store)], rows], rows)
            )
            single.append(name | {"microseconds": found})
        for store, nbytes in weight_bytes.items():
            name = {"backend": "cuda", "weights": f"{kind} {plain(store)}", "rows": 64}
            for entry in many:
                if name.items() <= entry.items():
                    linears = entry["linears_milliseconds"] / LAYERS * 1e3
                    steps.append(name | step(linears, nbytes, heads[END_STORES[plain(store)], 64], 64))
    return {"steps": steps, "launches": single, "many": many}


def step(linears: float, weight_bytes: float, head: dict[str, Any], rows: int) -> dict[str, float]:
    """Milliseconds of a step, and the part of it that the reading of its bytes takes at the least. linears: microseconds
    of a layer's; weight_bytes: of a layer."""
    cache_bytes = 2 * 2 * CONTEXT * 8 * 128 * rows
    cache = cache_bytes / (0.75 * BANDWIDTH) * 1e6
    attention = max(ATTENTION, cache + SMALL) + (MERGE if rows * 8 < 256 else 0)
    small = SMALL * (1 + (FUSED_GATES < rows <= 16))  # rope, and the gate; of more rows the linears count theirs
    end = (launch_microseconds if rows <= 16 else many_microseconds)(head) + 5 * SMALL
    total = LAYERS * (linears + attention + small) + end
    nbytes = LAYERS * (weight_bytes + cache_bytes) + head["weights"] * STORES[head["store"]][0]
    return {"milliseconds": round(total / 1e3, 2), "of_floor": round(nbytes / BANDWIDTH * 1e6 / total, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them into predicted.json")
    args = parser.parse_args()
    found = predictions()
    for entry in found["steps"]:
        took = f"{entry['milliseconds']:>7.2f} ms, {entry['of_floor']:.0%} of it the bytes"
        print(f"{entry['weights']:<22}{entry['rows']:>3} rows {took}")
    for entry in found["launches"]:
        print(f"{entry['weights']:<22}{entry['rows']:>3} rows  {entry['microseconds']}")
    for entry in found["many"]:
        print(
            f"{entry['weights']:<22}{entry['rows']:>5} rows: linears of a pass {entry['linears_milliseconds']:.2f} ms, "
            f"dense bf16 by cuBLAS {entry['dense_cublas_milliseconds']:.2f} ({entry['of_dense']:.2f} x)"
        )
    if args.write:
        kept = json.loads(PREDICTED.read_text())
        for name, new in found.items():
            mine = {(e["weights"], e["rows"]) for e in new}
            others = [e for e in kept.get(name, []) if e["backend"] != "cuda" or (e["weights"], e["rows"]) not in mine]
            kept[name] = new + others
        lines = [json.dumps(kept["about"])]
        body = ",\n".join(f'"{name}": [\n' + ",\n".join(json.dumps(e) for e in kept[name]) + "\n]" for name in found)
        PREDICTED.write_text(f'{{\n"about": {lines[0]},\n{body}\n}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
