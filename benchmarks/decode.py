"""Decode speed of a checkpoint: `python benchmarks/decode.py DIR [options of cai bench decode]`.

`cai_runtime/bench/decode.py` defines the figures. Writes benchmarks/results/decode.json, unless --json names another file.
"""

import sys
from pathlib import Path

from cai_runtime.cli import main

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    sys.exit(main(["bench", "decode", "--json", str(RESULTS / "decode.json"), *sys.argv[1:]]))
