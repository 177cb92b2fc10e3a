"""Attention by itself, backends side by side: `python benchmarks/attention.py [options of cai bench attention]`.

`cai_runtime/bench/attention.py` defines the figures. Writes benchmarks/results/attention.json, unless --json names another
file.
"""

import sys
from pathlib import Path

from cai_runtime.cli import main

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    sys.exit(main(["bench", "attention", "--json", str(RESULTS / "attention.json"), *sys.argv[1:]]))
