"""Next-token logits for a batch of growing texts: by the engine, or by transformers for architectures that the engine does
not have.

A wave is one batch of texts from their first tokens to their last. Each text has a lane, a fixed place in the KV cache.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cai_runtime.errors import CompressionError, UnsupportedModelError
from cai_runtime.stock.cached_forward import cache_name, cached_forward

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feed:
    """Tokens to append to a lane's text, at least one. start: position of the first; 0 begins a new text."""

    lane: int
    token_ids: list[int]
    start: int


class NextToken(Protocol):
    """A loaded model that continues up to `lanes` texts of up to `max_context` tokens at once."""

    name: str  # of the engine, for the report
    lanes: int
    vocab_size: int
    max_context: int
    max_feed: int  # most tokens of a lane in one call

    def begin_wave(self) -> None:
        """Clear every lane."""
        ...

    def logits(self, feeds: Sequence[Feed]) -> np.ndarray:
        """Feed each lane at most once. Returns fp32 [feeds, vocab_size]: the logits after each feed's last token."""
        ...

    def close(self) -> None: ...


def open_next_token(
    path: Path, *, lanes: int, length: int, device: str = "cpu", progress: bool | None = None
) -> NextToken:
    """Open a checkpoint, dense or slim, for up to `lanes` texts of up to `length` tokens.

    A small KV cache gives fewer lanes.

    Raises CompressionError if the model can't be run or does not fit the free memory, CheckpointError if it is damaged.
    """
    from cai_runtime.slim.reader import Checkpoint

    with Checkpoint.open(path) as checkpoint:
        infos = checkpoint.tensors().values()
        stored = sum(info.nbytes for info in infos)
        full = 4 * sum(math.prod(info.shape) for info in infos)
        slim, config = checkpoint.is_slim, checkpoint.config
    _require_memory(path, stored, device)
    # The KV cache is allocated for `context` positions.
    context = min(length, int(config.get("max_position_embeddings") or length))
    try:
        return EngineLanes(path, lanes=lanes, context=context, device=device, progress=progress)
    except UnsupportedModelError as e:
        if slim:
            raise CompressionError(f"{path} can't write its own calibration text: {e}; give a text file") from e
        logger.info("text of %s is sampled by transformers: %s", path, e)
    _require_memory(path, full if device == "cpu" else stored, device)
    return TransformersLanes(path, lanes=lanes, device=device)


def _require_memory(path: Path, need: int, device: str) -> None:
    from cai_runtime.engine.memory import available_memory

    free = available_memory("cuda" if device.startswith("cuda") else "cpu")
    if need > free:
        raise CompressionError(
            f"{path} needs {need >> 20} MiB to write its own calibration text, {free >> 20} MiB are free: give a text "
            "file or a dataset as calibration text"
        )


class EngineLanes:
    """`NextToken` over the engine's runner. A lane is a fixed run of KV cache pages. Its logits do not depend on other
    lanes."""

    name = "cai_runtime's engine"
    max_feed = 64

    def __init__(self, path: Path, *, lanes: int, context: int, device: str, progress: bool | None = None):
        """context: positions of a lane, at most the model's.

        Raises UnsupportedModelError for an architecture that the engine does not have, CompressionError if not even one
        lane fits into memory.
        """
        from cai_runtime.engine.open import load_runner

        runner, _ = load_runner(
            path,
            keep_all=True,
            device=device,
            max_batch=lanes,
            max_context=context,
            cuda_graphs=False,
            progress=progress,
        )
        self.vocab_size, self.max_context = runner.vocab_size, runner.max_context
        self._pages = -(-self.max_context // runner.page_size)
        self.lanes = min(lanes, runner.num_pages // self._pages)
        if self.lanes < 1:
            runner.close()
            raise CompressionError(f"no memory for one text of {context} tokens of {path}: give a text file")
        self._runner = runner

    def begin_wave(self) -> None:
        """Nothing to clear: a text that begins at position 0 does not read its pages' old contents."""

    def logits(self, feeds: Sequence[Feed]) -> np.ndarray:
        from cai_runtime.engine.runner import ScheduledSequence

        step = []
        for feed in feeds:
            first = feed.lane * self._pages
            step.append(
                ScheduledSequence(feed.token_ids, feed.start, list(range(first, first + self._pages)), wanted=1)
            )
        return self._runner.run(step).cpu().numpy()

    def close(self) -> None:
        self._runner.close()


class TransformersLanes:
    """`NextToken` over stock transformers, for causal language models that take a padding mask and positions.

    Every lane takes one token per step, so column t of the KV cache is step t. A lane's mask hides the columns of its
    earlier texts. Layers with a recurrent state in place of keys continue from the earlier text.
    """

    name = "transformers"
    max_feed = 1

    def __init__(self, path: Path, *, lanes: int, device: str):
        """Raises CompressionError for a model that can't be loaded or takes no mask, positions or KV cache."""
        import torch

        from cai_runtime.stock.load import dense_reference

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = dense_reference(path, dtype=dtype, device=device)
        missing = {"attention_mask", "position_ids"} - set(inspect.signature(model.forward).parameters)
        if cache_name(model) is None:
            missing.add("KV cache")
        if missing:
            raise CompressionError(
                f"{type(model).__name__} takes no {', no '.join(sorted(missing))}: it can't write several texts at once; "
                "give a text file or a dataset as calibration text"
            )
        config = model.config.get_text_config()
        self.lanes, self.vocab_size = lanes, int(config.vocab_size)
        self.max_context = int(getattr(config, "max_position_embeddings", None) or 2048)
        self._model: Any = model
        self.begin_wave()

    def begin_wave(self) -> None:
        import torch

        self._cache: Any = None
        self._mask = torch.zeros(self.lanes, 0, dtype=torch.int64)

    def logits(self, feeds: Sequence[Feed]) -> np.ndarray:
        import torch

        # A lane without a feed gets a filler token, because a row with everything masked has no softmax.
        ids = torch.zeros(self.lanes, 1, dtype=torch.int64)
        positions = torch.zeros(self.lanes, 1, dtype=torch.int64)
        fed = {feed.lane: feed for feed in feeds}
        for lane in range(self.lanes):
            feed = fed.get(lane)
            if feed is not None:
                (ids[lane, 0],), positions[lane, 0] = feed.token_ids, feed.start
            if feed is None or feed.start == 0:
                self._mask[lane] = 0
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        device = next(self._model.parameters()).device
        with torch.inference_mode():
            output, self._cache = cached_forward(
                self._model,
                self._cache,
                input_ids=ids.to(device),
                attention_mask=self._mask.to(device),
                position_ids=positions.to(device),
            )
        rows: torch.Tensor = output.logits[[feed.lane for feed in feeds], -1]
        return rows.float().cpu().numpy()

    def close(self) -> None:
        self._model = self._cache = None
