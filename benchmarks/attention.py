"""Attention by itself, backends side by side: `python benchmarks/attention.py [options of cai bench attention]`.

The measurement is `cai_runtime.bench` (`cai_runtime/bench/attention.py` says what is measured); this keeps
its JSON in benchmarks/results/attention.json unless the options say otherwise.
"""

import sys
from pathlib import Path

from cai_runtime.cli import main

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    sys.exit(main(["bench", "attention", "--json", str(RESULTS / "attention.json"), *sys.argv[1:]]))
