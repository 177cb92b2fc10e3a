"""Linears by themselves, backends side by side: `python benchmarks/linear.py [options of cai bench linear]`.

`cai_runtime/bench/linear.py` defines the figures. Writes benchmarks/results/linear.json and the roofline plot linear.png,
unless --json and --plot name other files. The plot needs the `bench` extra: pip install 'cai-runtime[bench]'.
"""

import sys
from pathlib import Path

from cai_runtime.cli import main

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    kept = ["--json", str(RESULTS / "linear.json"), "--plot", str(RESULTS / "linear.png")]
    sys.exit(main(["bench", "linear", *kept, *sys.argv[1:]]))
