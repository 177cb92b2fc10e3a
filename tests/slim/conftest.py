"""Small slim checkpoints to read, to break and to rewrite."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.writer import CheckpointWriter

SPECS = {
    "layers.0.dense": ModuleSpec("dense", 7, 5, None, ("int8",)),
    "layers.0.low": ModuleSpec("lowrank", 9, 6, 4, ("int8", "bf16")),
    "layers.1.inter": ModuleSpec("interpolative", 8, 6, 3, ("int8", "fp16")),
    "layers.0.four": ModuleSpec("lowrank", 8, 35, 5, ("int4-g32-zp", "int4-g64")),
    "layers.1.mpo": ModuleSpec("mpo", 6, 10, (4, 3), ("int8", "fp32", "bf16"), (2, 3, 1), (5, 1, 2)),
}


@pytest.fixture
def write_checkpoint() -> Callable[..., Path]:
    """Writes one module of every kind, a bias, and two plain tensors; keyword arguments go to the writer."""

    def write(path: Path, seed: int = 0, **options: Any) -> Path:
        generator = torch.Generator().manual_seed(seed)
        options.setdefault("config", {"model_type": "llama"})
        with CheckpointWriter(path, **options) as writer:
            for name, spec in SPECS.items():
                cores = [torch.randn(shape, generator=generator) for shape in spec.core_shapes]
                pivot = torch.randperm(spec.out_features, generator=generator) if spec.has_pivot else None
                bias = torch.randn(spec.out_features, generator=generator) if spec.kind == "lowrank" else None
                writer.add_module(name, spec, cores, pivot=pivot, bias=bias)
            writer.add_tensor("embed.weight", torch.randn(11, 6, generator=generator).bfloat16())
            writer.add_tensor("norm.weight", torch.ones(6))
            writer.finish({"keep": 0.5})
        return path

    return write


@pytest.fixture
def edit_header() -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    """Rewrites a shard with its header changed and its data as it was."""

    def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        new = json.dumps(header).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])

    return edit


@pytest.fixture
def edit_json() -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
        value = json.loads(file.read_text())
        change(value)
        file.write_text(json.dumps(value))

    return edit
