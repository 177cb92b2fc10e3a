"""Linears by themselves, backends side by side: `python benchmarks/linear.py [options of cai bench linear]`.

The measurement is `cai_runtime.bench` (`cai_runtime/bench/linear.py` says what is measured); this keeps
its JSON and roofline plot in benchmarks/results/linear.json and linear.png unless the options say otherwise.
The plot needs the `bench` extra: pip install 'cai-runtime[bench]'.
"""

import sys
from pathlib import Path

from cai_runtime.cli import main

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    kept = ["--json", str(RESULTS / "linear.json"), "--plot", str(RESULTS / "linear.png")]
    sys.exit(main(["bench", "linear", *kept, *sys.argv[1:]]))
