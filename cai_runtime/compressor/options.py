"""`Options`: the options of a compression, checked before any work."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from cai_runtime.compressor.factor.allocate import Allocation
from cai_runtime.compressor.factor.plan_file import PlanSource, plan_entries
from cai_runtime.compressor.option_types import MOST_SEED, plain
from cai_runtime.errors import CompressionError
from cai_runtime.slim.spec import STORE_ALIASES, STORES, Kind, canonical_store
from cai_runtime.stock.load import DTYPES

KINDS = ("interpolative", "lowrank", "mpo", "dense")
DEFAULT_KEEP = 0.8
REFINE_EPOCHS, HEAL_TOKENS = 2, 65_536  # defaults
# From this keep on, healing makes refinement unnecessary: refinement cuts SmolLM2's perplexity by 1 % at keep 0.8 and by
# 10 % at 0.5. A speech model's decoder has too little text for healing, so it is refined at any keep.
REFINE_BELOW = 0.7
SMALLEST_KEEP = 0.3  # default smallest keep of an elastic checkpoint
COMPETING_STORES = ("int8", "int4-g64")  # candidates under a budget in bytes
BATCH = 2  # sequences per batch
REFINE_RATE = 2e-3  # see `refine_block`
# See `HealSettings.rate`. At keep 0.5, with a divergence of about 1.3 nats, 24 steps work best at 8e-4, worse at 4e-4; 2e-3
# is too large.
HEAL_RATE = 6e-4
MOST_BYTES = 1 << 62
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Options:
    """The options of `compress` (see there), with defaults filled in and canonical store names.

    target_bytes: bytes as an int, or a share of the bf16 bytes as a float in (0, 1]. stores: candidates for every layer.
    embedding_store: None: the ends choose among `stores`, too. plan: entries of a plan file; then neither keep nor
    target_bytes is set. smallest_keep: None unless elastic. mixed: train fp32 models with bf16 matrix products.

    Raises CompressionError, which names the option, for a value out of range.
    """

    keep: float | None
    target_bytes: int | float | None
    stores: tuple[str, ...]
    kind: Kind
    allocation: Allocation
    curvature: bool
    shift: bool
    refine_epochs: int
    refine_rate: float
    heal_tokens: int
    heal_rate: float
    calibration: str | tuple[str, ...] | None
    embedding_store: str | None
    samples: int
    sequence_length: int
    rank_multiple: int
    floor: float
    device: str
    dtype: str
    mixed: bool
    seed: int
    plan: dict[str, dict[str, Any]] | None
    elastic: bool
    smallest_keep: float | None

    @classmethod
    def of(cls, *, speech: bool = False, **options: Any) -> Options:
        """The options of `compress`, with the defaults that depend on other options filled in. speech: for a speech model.

        Raises CompressionError, which names the option.
        """
        return cls._filled_in(speech=speech, **plain(options))

    @classmethod
    def _filled_in(
        cls,
        *,
        keep: float | None,
        target_bytes: int | str | None,
        store: str | None,
        kind: Kind | None,
        refine_epochs: int | None,
        heal_tokens: int | None,
        embedding_store: str | None,
        rank_multiple: int | None,
        calibration: Any,
        device: str,
        dtype: str | None,
        plan: PlanSource | None = None,
        elastic: bool = False,
        smallest_keep: float | None = None,
        speech: bool,
        **others: Any,
    ) -> Options:
        if keep is not None and target_bytes is not None:
            raise CompressionError("keep and target_bytes are two budgets: give one of them")
        if plan is not None:
            if any(given is not None for given in (keep, target_bytes, store, kind)) or elastic:
                raise CompressionError(
                    "a plan says what every layer becomes: leave keep, target_bytes, store, kind and elastic out"
                )
        elif keep is None and target_bytes is None:
            keep = 1.0 if elastic else DEFAULT_KEEP
        if elastic and smallest_keep is None:
            smallest_keep = SMALLEST_KEEP
        if kind is None:
            kind = "lowrank" if elastic else "interpolative"
        if refine_epochs is None:
            healed = heal_tokens != 0 and keep is not None and keep >= REFINE_BELOW and not speech
            refine_epochs = 0 if elastic or healed else REFINE_EPOCHS
        if heal_tokens is None:
            heal_tokens = 0 if elastic else HEAL_TOKENS
        if store is None:
            stores: tuple[str, ...] = ("int8",) if target_bytes is None else COMPETING_STORES
        else:
            stores = (canonical_store(store),)
        fine = [s for s in stores if s in STORES and STORES[s].bits != 4]
        # Under a budget in bytes the stores of embedding and head compete, too. Their errors need loss gradients.
        competing = store is None and target_bytes is not None and others["curvature"]
        if embedding_store is None and not competing:
            embedding_store = fine[0] if fine else "int8"
        if rank_multiple is None:
            rank_multiple = max([16, *(STORES[s].group for s in stores if s in STORES)])
        return cls(
            keep=keep,
            target_bytes=_parse_bytes(target_bytes),
            stores=stores,
            kind=kind,
            refine_epochs=refine_epochs,
            heal_tokens=heal_tokens,
            embedding_store=None if embedding_store is None else canonical_store(embedding_store),
            rank_multiple=rank_multiple,
            calibration=_plain(calibration),
            device=device,
            dtype=dtype or ("bf16" if device.startswith("cuda") else "fp32"),
            mixed=dtype is None and device == "cpu" and multiplies_bf16(),
            refine_rate=REFINE_RATE,
            heal_rate=HEAL_RATE,
            plan=None if plan is None else plan_entries(plan),
            elastic=elastic,
            smallest_keep=smallest_keep,
            **others,
        )

    @property
    def heal_steps(self) -> int:
        """Optimizer steps of healing."""
        return self.heal_tokens // (BATCH * self.sequence_length)

    @property
    def text_samples(self) -> int:
        """Number of sequences of text, for calibration and for healing."""
        return self.samples + -(-self.heal_tokens // self.sequence_length)

    def __post_init__(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise CompressionError(message)

        need(self.keep is None or 0 < self.keep <= 1, f"keep must be in (0, 1], is {self.keep}")
        need(self.kind in KINDS, f"kind must be one of {', '.join(KINDS)}, is {self.kind!r}")
        need(
            self.allocation in get_args(Allocation),
            f"allocation must be one of {', '.join(get_args(Allocation))}, is {self.allocation!r}",
        )
        need(
            self.target_bytes is None or self.allocation == "pooled",
            "target_bytes needs allocation 'pooled': a uniform share of bytes is what `keep` and one store give",
        )
        known = ", ".join([*STORES, *STORE_ALIASES])
        need(
            self.kind != "dense" or self.target_bytes is not None or self.keep == 1,
            "kind 'dense' has no ranks to choose: give target_bytes, or keep 1",
        )
        ends = [("embedding_store", self.embedding_store)] if self.embedding_store is not None else []
        for name, value in [*(("store", s) for s in self.stores), *ends]:
            need(value in STORES, f"{name} must be one of {known}, is {value!r}")
        need(self.dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, is {self.dtype!r}")
        for name, least in (
            ("samples", 1),
            ("sequence_length", 2),
            ("rank_multiple", 1),
            ("refine_epochs", 0),
            ("heal_tokens", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            need(value >= least, f"{name} must be at least {least}, is {value}")
        need(self.seed <= MOST_SEED, f"seed must be at most {MOST_SEED}, is {self.seed}")
        need(0 <= self.floor <= 1, f"floor must be in [0, 1], is {self.floor}")
        cuda = re.fullmatch(r"cuda(?::(\d{1,4}))?", self.device)
        need(self.device == "cpu" or cuda is not None, f"device must be cpu, cuda or cuda:N, is {self.device!r}")
        if cuda is not None:
            need(torch.cuda.is_available(), f"device {self.device!r}: no CUDA device is available")
            count = torch.cuda.device_count()
            need(int(cuda[1] or 0) < count, f"device {self.device!r}: there are {count} CUDA devices, counted from 0")
        if self.elastic:
            self._check_elastic(need)
        else:
            need(self.smallest_keep is None, "smallest_keep is an elastic checkpoint's: it needs elastic")

    def _check_elastic(self, need: Callable[[bool, str], None]) -> None:
        """Check the options that an elastic checkpoint restricts."""
        need(self.keep is not None, "target_bytes is one size, an elastic checkpoint has many: give keep, its largest")
        assert self.keep is not None and self.smallest_keep is not None
        need(
            0 < self.smallest_keep < self.keep,
            f"smallest_keep must be in (0, keep), is {self.smallest_keep} with keep {self.keep}",
        )
        need(
            self.kind == "lowrank",
            f"an elastic checkpoint's kind is lowrank, not {self.kind}: only lowrank cores hold those of smaller ranks",
        )
        need(self.allocation == "pooled", f"an elastic checkpoint's allocation is pooled, not {self.allocation}")
        need(not self.shift, "shift fits layers to one keep's inputs, an elastic checkpoint has many: leave it out")
        need(
            self.refine_epochs == 0,
            f"an elastic checkpoint's blocks can't be refined: refine_epochs must be 0, is {self.refine_epochs}",
        )
        need(
            self.rank_multiple % 2 == 0 or not any(STORES[store].bits == 4 for store in self.stores),
            f"rank_multiple must be even with {self.stores[0]}, whose columns share bytes, is {self.rank_multiple}",
        )


def multiplies_bf16() -> bool:
    """Whether the processor has bf16 matrix instructions. Without them, bf16 products are slower than fp32."""
    # torch 2.11 lacks `get_capabilities`; then the answer is False.
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _parse_bytes(value: int | str | None) -> int | float | None:
    """Bytes as an int; a share ("45%") as a float."""
    if value is None:
        return None
    text = str(value).strip()
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if share and 0 < float(share[1]) <= 100:
        return float(share[1]) / 100
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if size and size[2].upper() in _UNITS:
        count = float(size[1]) * _UNITS[size[2].upper()]
        if 1 <= count <= MOST_BYTES:
            return int(count)
    raise CompressionError(
        f"target_bytes must be a number of bytes, a size like 80MB or 1.5GiB, or a share of the bf16 bytes like 45%, "
        f"is {value!r}"
    )


def _plain(source: Any) -> str | tuple[str, ...] | None:
    if source is None or isinstance(source, str):
        return source
    if isinstance(source, Path):
        return str(source)
    if (
        isinstance(source, Sequence)
        and not isinstance(source, bytes)
        and all(isinstance(i, str | Path) for i in source)
    ):
        return tuple(str(item) for item in source)
    raise CompressionError(f"calibration must be a name, a path or a list of paths, is {source!r}")
