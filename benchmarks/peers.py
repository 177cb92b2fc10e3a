"""Decode speed beside llama.cpp and transformers: `python benchmarks/peers.py DIR [options of cai bench decode]`.

Runs `cai bench decode DIR --peers`. Writes benchmarks/results/decode_peers.json, unless --json names another file. Needs the
`peers` extra: pip install 'cai-runtime[peers]'.
"""

import sys
from pathlib import Path

from cai_runtime.cli import main

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    sys.exit(main(["bench", "decode", "--peers", "--json", str(RESULTS / "decode_peers.json"), *sys.argv[1:]]))
