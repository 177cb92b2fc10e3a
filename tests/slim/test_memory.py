"""A loader that copies each tensor and releases it never holds the checkpoint twice: measured in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.stores import quantize
from cai_runtime.slim.writer import CheckpointWriter

CONSTANT = 64 << 20  # bytes; stated in docs/format.md

LOADER = """
import json, sys
import torch
from pathlib import Path
from cai_runtime.slim.reader import Checkpoint

def status(key):  # bytes
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key + ":"))
    return int(line.split()[1]) * 1024

torch.ones(1 << 20).add_(1).aminmax()  # torch's own buffers and threads are not the loader's
before = status("VmHWM")
resident = status("VmRSS")
with Checkpoint.open(sys.argv[1]) as checkpoint:
    packed = []
    for name in checkpoint.tensors():
        packed.append(checkpoint.tensor(name).clone())
        if sys.argv[2] == "release":
            checkpoint.release(name)
    # The peak can't have been before the copies were there, so the high-water mark is theirs.
    print(json.dumps({"bytes": checkpoint.nbytes, "peak": status("VmHWM") - resident, "earlier": before - resident}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 300 MB in three shards: layers of an embedding, int8 and bf16 modules, and many small tensors between them."""
    path = tmp_path_factory.mktemp("large") / "c"
    spec = ModuleSpec("interpolative", 4096, 1024, 767, ("int8", "bf16"))  # odd sizes: pages shared between tensors
    dense = ModuleSpec("dense", 1024, 4096, None, ("bf16",))
    packed = zip(spec.core_shapes, spec.store, strict=True)
    cores = [quantize(torch.randn(shape), store) for shape, store in packed]  # packed once: faster
    weight = torch.randn(dense.core_shapes[0])
    with CheckpointWriter(path, config={"model_type": "llama"}, max_shard_bytes=120 << 20) as writer:
        writer.add_tensor("embed.weight", torch.randn(20_000, 1024).bfloat16())
        for k in range(18):
            writer.add_module(f"layers.{k}.up", spec, cores, pivot=torch.randperm(4096))
            writer.add_module(f"layers.{k}.down", dense, [weight])
            writer.add_tensor(f"layers.{k}.norm.weight", torch.ones(1024))
        writer.finish()
    return path


def measure(path: Path, mode: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(path), mode], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_of_loading(large: Path) -> None:
    with_release, without = measure(large, "release"), measure(large, "keep")
    nbytes = with_release["bytes"]
    assert nbytes > 280e6
    assert with_release["earlier"] < CONSTANT  # else the mark could be older than the loading
    assert with_release["peak"] <= 1.2 * nbytes + CONSTANT
    # The measure sees the second copy when there is one.
    assert without["peak"] > 1.6 * nbytes
