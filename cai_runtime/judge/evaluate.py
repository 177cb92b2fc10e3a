"""How good a model is, and how like another: perplexity, and agreement of next-token distributions.

A "model" here is anything that gives logits: a transformers model, or a callable from token ids, int64 [batch, tokens],
to logits [batch, tokens, vocabulary].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cai_runtime.convert.cache import tqdm_disable
from cai_runtime.errors import CompressionError

Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Agreement:
    """Of `model` with `reference`. top1: share of positions with the same most likely token. kl: mean Kullback-Leibler
    divergence KL(reference || model), in nats per position. tokens: positions compared."""

    top1: float
    kl: float
    tokens: int


@torch.inference_mode()
def perplexity(
    model: Any,
    token_ids: Sequence[int] | torch.Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    batch_size: int = 4,
    progress: bool | None = None,
) -> float:
    """exp of the mean negative log likelihood, in nats, of each token given those before it in its window.

    token_ids: one text, [tokens]. window: tokens the model sees at once. stride: from one window's start to the next
    (default: `window`, windows that do not overlap, of which the first token is not scored; less: every token is scored
    once, with at least `window - stride` tokens before it).

    Raises CompressionError for fewer than two tokens or an impossible stride.
    """
    stride = window if stride is None else stride
    if not 0 < stride <= window or window < 2:
        raise CompressionError(f"stride {stride} must lie in 1 .. window, and window {window} be at least 2")
    ids = _row(token_ids)
    total, count = 0.0, 0
    compute = logits_of(model)
    batches = list(_batches(ids, window, stride, batch_size))
    for batch, scored_from in tqdm(batches, desc="perplexity", unit="batch", disable=tqdm_disable(progress)):
        logits = compute(batch)[:, scored_from - 1 : -1].float()
        targets = batch[:, scored_from:].to(logits.device)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    return math.exp(total / count)


@torch.inference_mode()
def agreement(
    reference: Any,
    model: Any,
    token_ids: Sequence[int] | torch.Tensor,
    *,
    window: int = 512,
    batch_size: int = 1,
    progress: bool | None = None,
) -> Agreement:
    """Compare two models' next-token distributions at every position of a text cut into windows. Arguments as in
    `perplexity`."""
    ids = _row(token_ids)
    same, divergence, count = 0, 0.0, 0
    batches = list(_batches(ids, window, window, batch_size))
    first, second = logits_of(reference), logits_of(model)
    for batch, _ in tqdm(batches, desc="agreement", unit="batch", disable=tqdm_disable(progress)):
        p = first(batch).float().log_softmax(-1)
        q = second(batch).to(p.device).float().log_softmax(-1)
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        divergence += float((p.exp() * (p - q)).sum())
        count += batch.numel()
    return Agreement(same / count, divergence / count, count)


def logits_of(model: Any) -> Logits:
    """The model as a function from token ids [batch, tokens] to logits."""
    if isinstance(model, torch.nn.Module) and hasattr(model, "config"):
        device = next(model.parameters()).device
        return lambda ids: model(input_ids=ids.to(device), use_cache=False).logits
    return model


def _row(token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    ids = torch.as_tensor(token_ids, dtype=torch.int64)
    if ids.ndim != 1 or ids.numel() < 2:
        raise CompressionError(f"a text of at least two token ids is needed, not a tensor of shape {list(ids.shape)}")
    return ids


def _batches(ids: torch.Tensor, window: int, stride: int, batch_size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Windows [batch, tokens] and the first position in them that is scored. A last window may be shorter."""
    first = ids[:window]
    yield first[None], 1
    # Every further window scores what the one before did not reach: its last `stride` tokens, or, where windows do not
    # overlap, all but its first one.
    scored_from = max(window - stride, 1)
    starts = range(stride, ids.numel() - window + 1, stride)
    for k in range(0, len(starts), batch_size):
        yield torch.stack([ids[s : s + window] for s in starts[k : k + batch_size]]), scored_from
    rest = ids[(starts[-1] if starts else 0) + stride :] if ids.numel() > window else ids[:0]
    if rest.numel() > scored_from:
        yield rest[None], scored_from
