"""Opening a checkpoint never holds a second copy of it: peak memory against its bytes, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Beyond 1.2 x the weights: the largest tensor is there twice while it is packed, and huge pages round up.
CONSTANT = 128 << 20

PROGRAM = """
import sys
from pathlib import Path
import torch, transformers
from cai_runtime.engine.open import load_runner
from cai_runtime.kernels import cpu_library
from cai_runtime.models import llama

def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

cpu_library.library()
before = peak()
runner, _ = load_runner(Path(sys.argv[1]), kv_cache="8MiB", progress=False)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(smollm2_dir: Path):
    weights = sum(f.stat().st_size for f in smollm2_dir.glob("*.safetensors"))
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(smollm2_dir)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert weights <= int(done.stdout) + (8 << 20) and int(done.stdout) <= 1.2 * weights + CONSTANT
