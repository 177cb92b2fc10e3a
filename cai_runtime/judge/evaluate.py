"""Perplexity of a model, and agreement of two models' next-token distributions.

A model is a transformers model, or a function from token ids, int64 [batch, tokens], to logits [batch, tokens,
vocabulary].
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
    """Agreement of `model` with `reference`.

    Attributes:
        top1: share of positions with the same most likely token.
        kl: mean KL(reference || model), nats per position.
        tokens: number of compared positions.
    """

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

    Args:
        token_ids: one text, [tokens].
        window: tokens per window, at least 2.
        stride: tokens from one window's start to the next, at most `window`. The default is `window`: no overlap, and each
            window's first token is not scored. A smaller stride scores every token but the first once, each after at
            least `window - stride` tokens.
        batch_size: windows per forward pass.
        progress: a progress bar on stderr; None shows it on a terminal only.

    Raises CompressionError for fewer than two tokens, or a window or stride out of range.
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
    """Compare two models' next-token distributions at every position of a text, in windows that do not overlap.

    Arguments and errors as of `perplexity`.
    """
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
    """(windows [batch, tokens], first scored position in each). The last window may be shorter."""
    first = ids[:window]
    yield first[None], 1
    # A later window scores only its last `stride` tokens, new to it. Without overlap it scores all but its first token.
    scored_from = max(window - stride, 1)
    starts = range(stride, ids.numel() - window + 1, stride)
    for k in range(0, len(starts), batch_size):
        yield torch.stack([ids[s : s + window] for s in starts[k : k + batch_size]]), scored_from
    rest = ids[(starts[-1] if starts else 0) + stride :] if ids.numel() > window else ids[:0]
    if rest.numel() > scored_from:
        yield rest[None], scored_from
