"""What the linear layers see on real text: second moments of their inputs and, if asked, of the loss gradients at their
outputs.

The tokens stream through the model once; only [in, in] and [out, out] matrices stay. Sums are taken in fp32 over one batch
and in fp64 over the batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from cai_runtime.compress.targets import InputGroup
from cai_runtime.errors import CompressionError

BLOCK = 384  # columns of the Gram matrix that are computed at a time; only blocks on and below the diagonal are


class GramSum:
    """The running sum of x^T x over rows x, [features, features], fp64. Feed it any number of batches."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.rows = 0
        self._sum = torch.zeros(features, features, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor) -> None:
        """x: [..., features], any float dtype."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        for start in range(0, x.shape[1], BLOCK):
            stop = min(start + BLOCK, x.shape[1])
            self._sum[start:stop, :stop] += x[:, start:stop].mT @ x[:, :stop]
        self.rows += x.shape[0]

    def mean(self) -> torch.Tensor:
        """[features, features], fp64, symmetric; zeros when nothing was fed."""
        lower = self._sum.tril()
        return (lower + lower.tril(-1).mT) / max(self.rows, 1)


@dataclass(frozen=True)
class GroupMoments:
    """Of one input group: the mean of x x^T, [in, in], and by target name the mean of g g^T, [out, out], both fp64."""

    group: InputGroup
    tokens: int
    input_gram: torch.Tensor
    output_grams: dict[str, torch.Tensor] = field(default_factory=dict)


def gram_bytes(group: InputGroup, gradients: bool) -> int:
    """Bytes that the moments of a group take while they are gathered."""
    outputs = sum(t.module.out_features**2 for t in group.targets) if gradients else 0
    return 8 * (group.in_features**2 + outputs)


def gather_moments(
    model: nn.Module,
    groups: Sequence[InputGroup],
    sequences: torch.Tensor,
    *,
    gradients: bool = False,
    batch_size: int = 4,
    max_bytes: int = 8 << 30,
    progress: bool | None = None,
) -> Iterator[GroupMoments]:
    """Yield the moments of every group, in order, after as few passes over `sequences` as `max_bytes` allows.

    model: a causal language model in evaluation mode, on any device. sequences: int64 [samples, tokens].
    gradients: also differentiate the summed next-token loss (about twice the time).

    Raises CompressionError when an activation or a gradient is not finite.
    """
    passes = _passes(groups, gradients, max_bytes)
    disable = None if progress is None else not progress
    with tqdm(total=len(passes) * sequences.shape[0], desc="calibrate", unit="seq", disable=disable) as bar:
        for members in passes:
            inputs, outputs = _sums(model, members, gradients)
            with _hooks(members, inputs, outputs):
                for batch in sequences.split(batch_size):
                    _run(model, batch.to(_device(model)), gradients)
                    bar.update(batch.shape[0])
            for group in members:
                yield _moments(group, inputs, outputs)


def _passes(groups: Sequence[InputGroup], gradients: bool, max_bytes: int) -> list[list[InputGroup]]:
    passes: list[list[InputGroup]] = []
    room = 0
    for group in groups:
        need = gram_bytes(group, gradients)
        if need > room or not passes:
            passes.append([])
            room = max_bytes
        passes[-1].append(group)
        room -= need
    return passes


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _sums(model: nn.Module, groups: Sequence[InputGroup], gradients: bool):
    """Empty sums: of the inputs by the first target's name, of the gradients by each target's name."""
    device = _device(model)
    inputs = {g.targets[0].name: GramSum(g.in_features, device) for g in groups}
    outputs = {t.name: GramSum(t.module.out_features, device) for g in groups for t in g.targets if gradients}
    return inputs, outputs


@contextmanager
def _hooks(groups: Sequence[InputGroup], inputs: dict[str, GramSum], outputs: dict[str, GramSum]):
    """While open, every forward feeds `inputs` and every backward feeds `outputs`."""

    def feed(total: GramSum | None, gradient: GramSum | None):
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if total is not None:
                total.add(args[0])
            if gradient is not None:
                output.register_hook(gradient.add)

        return hook

    handles = []
    for group in groups:
        for target in group.targets:
            # One input sum serves the group; its first target feeds it.
            hook = feed(inputs.get(target.name), outputs.get(target.name))
            handles.append(target.module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: Any, ids: torch.Tensor, gradients: bool) -> None:
    if not gradients:
        with torch.inference_mode():
            # Without the head: its logits are not needed.
            getattr(model, "base_model", model)(input_ids=ids, use_cache=False)
        return
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
        # Summed, so that a token's gradient does not depend on how the text is cut into batches.
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").backward()


def _moments(group: InputGroup, inputs: dict[str, GramSum], outputs: dict[str, GramSum]) -> GroupMoments:
    name = group.targets[0].name
    total = inputs.pop(name)
    moments = GroupMoments(
        group,
        total.rows,
        total.mean(),
        {t.name: outputs.pop(t.name).mean() for t in group.targets if t.name in outputs},
    )
    for label, gram in [(f"inputs of {name}", moments.input_gram), *moments.output_grams.items()]:
        if not bool(gram.isfinite().all()):
            raise CompressionError(f"calibration met values that are not finite ({label}): try --dtype fp32")
    return moments
