"""Decode speed of a checkpoint: `python benchmarks/decode.py DIR [options of cai bench decode]`.

The measurement is `cai_runtime.bench` (`cai_runtime/bench/decode.py` says what is measured); this keeps its JSON in
benchmarks/results/decode.json unless --json says otherwise.
"""

import sys
from pathlib import Path

from cai_runtime.cli import main

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    sys.exit(main(["bench", "decode", "--json", str(RESULTS / "decode.json"), *sys.argv[1:]]))
