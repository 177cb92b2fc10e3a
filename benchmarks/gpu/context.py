"""The sizes of the sections' cases and the device: Llama-3.1-8B's shapes on the GPU, or tiny ones on the CPU in a rehearsal.
Also the predicted times of predicted.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
TINY: dict[str, Any] = LLAMA_8B | {
    "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
SMALLEST: dict[str, Any] = TINY | {  # Triton's interpreter takes milliseconds per program instance
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64,
}  # fmt: skip
KEEP = 0.5
INT4_GROUP = 128
# Stores of embedding and head, which are dense, by that of the layers: those that `cai compress` takes.
END_STORES = {"bf16": "bf16", "int8": "int8", "int4": "int8"}
PAGE_SIZE = 16
# Kind and store of the layers' linears.
VARIANTS = (
    ("interpolative", "bf16"), ("dense", "bf16"), ("interpolative", "int4"), ("interpolative", "int8"), ("dense", "int4"),
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """The sizes of the cases."""

    config: dict[str, Any]
    checked: dict[str, Any]  # config of models whose results are checked, while those of `config` are timed
    variants: tuple[tuple[str, str], ...]  # to check; `timed` are those of which whole models are timed
    context: int  # positions in the cache before a decode step
    decode_rows: tuple[int, ...]
    prefill_rows: tuple[int, ...]
    many_rows: tuple[int, ...]
    linear_rows: tuple[int, ...]
    serve_tokens: int
    copy_bytes: int
    attention: tuple[tuple[int, int], ...]  # cases of decode attention: (context, sequences)
    prompts: tuple[tuple[int, int], ...]  # cases of prefill attention: (tokens in the cache, new tokens)

    @property
    def timed(self) -> tuple[tuple[str, str], ...]:
        return tuple(v for v in self.variants if v != ("dense", "int4"))

    @property
    def groups(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The linears of one layer that run as one call: (in_features, out_features of each member) by name."""
        c = self.config
        hidden, wide = c["hidden_size"], c["intermediate_size"]
        kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
        return {
            "q/k/v": (hidden, (hidden, kv, kv)),
            "o": (hidden, (hidden,)),
            "gate/up": (hidden, (wide, wide)),
            "down": (wide, (hidden,)),
        }


REAL = Scale(
    LLAMA_8B, TINY, VARIANTS, 1024, (1, 16, 64), (512, 2048), (64, 512, 4096), (1, 4, 16), 64, 4 << 30,
    ((1024, 1), (1024, 16), (1024, 64), (8192, 1), (8192, 16)), ((0, 2048), (6144, 2048), (7680, 512)),
)  # fmt: skip
REHEARSAL = Scale(
    SMALLEST, SMALLEST, (("interpolative", "bf16"), ("dense", "bf16"), ("interpolative", "int4")), 20, (1, 2), (5,), (20,),
    (1,), 3, 1 << 20, ((20, 2),), ((0, 5), (12, 5)),
)  # fmt: skip


@dataclass(frozen=True)
class Context:
    """device: of all tensors. report: file of the suite's results so far. out: folder for further files of results."""

    scale: Scale
    device: str
    report: Path
    out: Path

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    @cached_property
    def backends(self) -> list[str]:
        """Backends to test, the default one first. Without a loadable library, "cuda" is missing, and the reason printed."""
        from cai_runtime.errors import KernelError
        from cai_runtime.kernels import cuda

        try:
            cuda.library()
        except (KernelError, ImportError) as error:
            print(f"no CUDA kernels: {error}", flush=True)
            return ["triton"]
        return ["triton", "cuda"]

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second of a copy on the device: from the results of section `roofs`, else measured now."""
        from gpu.roofs import copy_bandwidth

        found = json.loads(self.report.read_text()) if self.report.exists() else {}
        for item in found.get("sections", {}).get("roofs", {}).get("items", []):
            if item["what"] == "copy":
                return item["bytes_per_second"]
        return copy_bandwidth(self)["bytes_per_second"]


def predicted_step(backend: str, weights: str, rows: int) -> float | None:
    """Predicted milliseconds of a decode step; None: no prediction."""
    return next((e["milliseconds"] for e in _predicted()["steps"] if _matches(e, backend, weights, rows)), None)


def predicted_launches(backend: str, weights: str, rows: int) -> dict[str, float]:
    """Predicted microseconds of each core's launch, by group and stage ("q/k/v 0"). Empty: no prediction."""
    return next((e["microseconds"] for e in _predicted()["launches"] if _matches(e, backend, weights, rows)), {})


def _matches(entry: dict[str, Any], backend: str, weights: str, rows: int) -> bool:
    return (entry["backend"], entry["weights"], entry["rows"]) == (backend, weights, rows)


def _predicted() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("predicted.json").read_text())
