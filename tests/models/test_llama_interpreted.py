"""Llama over the Triton kernels, interpreted on the CPU in a process of its own: triton must know before its import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import needs_interpreter


@pytest.mark.slow
@needs_interpreter
def test_logits_through_triton():
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    chosen = (
        "test_a_cache_of_int8 or test_logits_match_transformers and "
        "(gqa or (biases and not qwen3) or (ministral and not pool) or (qwen3 and windows))"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(here / "test_llama.py"),
        "-k",
        chosen,
    ]
    done = subprocess.run(command, env=environment, cwd=here.parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and "6 passed" in done.stdout, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
