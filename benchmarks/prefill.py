"""Linears at prompt lengths, or whole prompts of a checkpoint:
`python benchmarks/prefill.py [DIR] [options of cai bench prefill]`.

`cai_runtime/bench/prefill.py` defines the figures. Writes benchmarks/results/prefill.json, unless --json names another file.
"""

import sys
from pathlib import Path

from cai_runtime.cli import main

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    sys.exit(main(["bench", "prefill", "--json", str(RESULTS / "prefill.json"), *sys.argv[1:]]))
