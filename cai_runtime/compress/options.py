"""What a compression is asked for, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from cai_runtime.compress.allocate import Allocation
from cai_runtime.errors import CompressionError
from cai_runtime.slim.spec import STORE_ALIASES, STORES, Kind

KINDS = ("interpolative", "lowrank")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What `compress` was asked for; see there, with the stores' names as files have them. Checked when made:
    CompressionError names the option."""

    keep: float
    store: str
    kind: Kind
    allocation: Allocation
    curvature: bool
    embedding_store: str
    samples: int
    sequence_length: int
    rank_multiple: int
    floor: float
    device: str
    dtype: str
    seed: int

    def __post_init__(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise CompressionError(message)

        need(0 < self.keep <= 1, f"keep must be in (0, 1], is {self.keep}")
        need(self.kind in KINDS, f"kind must be one of {', '.join(KINDS)}, is {self.kind!r}")
        need(
            self.allocation in get_args(Allocation),
            f"allocation must be one of {', '.join(get_args(Allocation))}, is {self.allocation!r}",
        )
        for name in ("store", "embedding_store"):
            value = getattr(self, name)
            known = ", ".join([*STORES, *STORE_ALIASES])
            need(value in STORES, f"{name} must be one of {known}, is {value!r}")
        need(self.dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, is {self.dtype!r}")
        need(self.samples >= 1, f"samples must be at least 1, is {self.samples}")
        need(self.sequence_length >= 2, f"sequence_length must be at least 2, is {self.sequence_length}")
        need(self.rank_multiple >= 1, f"rank_multiple must be at least 1, is {self.rank_multiple}")
        need(0 <= self.floor <= 1, f"floor must be in [0, 1], is {self.floor}")
        try:
            device = torch.device(self.device)
        except RuntimeError as e:
            raise CompressionError(f"device {self.device!r} is unknown: {e}") from None
        need(device.type != "cuda" or torch.cuda.is_available(), f"device {self.device!r}: no CUDA device is available")
