"""The matrices that a compression leaves dense, and why: those in no compressed layer and not in embedding or head.

A fused mixture of experts has most parameters of a model in one tensor for all experts, which is not a linear layer. "keep"
does not count it, so plan and report list it here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from torch import nn

from cai_runtime.compressor.factor.embedding_head import Ends
from cai_runtime.compressor.stats.targets import Target, shared_weights
from cai_runtime.compressor.stats.weights import DenseWeights
from cai_runtime.integrations.stand_in import is_linear


@dataclass(frozen=True)
class Left:
    """Parameters left uncompressed. parameters: count by reason, falling. total: parameters of the model."""

    parameters: dict[str, int]
    total: int

    @classmethod
    def of(cls, model: Any, weights: DenseWeights, targets: dict[str, Target], read: Container[str] = ()) -> Left:
        """Count the matrices of a model. read: layers that `check_blocks` excluded from the targets."""
        names = [*targets, *Ends.of(model, weights).names]
        taken = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
        modules = dict(model.named_modules(remove_duplicate=False))
        own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        shared = shared_weights(model)
        found: dict[str, int] = {}
        for name in weights.names():
            shape = weights.shape(name)
            if len(shape) < 2 or name in taken:
                continue
            reason = _reason(name, modules, own, read, shared)
            found[reason] = found.get(reason, 0) + math.prod(shape)
        ordered = sorted(found, key=lambda reason: -found[reason])
        return cls({reason: found[reason] for reason in ordered}, weights.parameters())

    def lines(self) -> list[str]:
        """The summary as text: one line, or none if nothing is left."""
        count = sum(self.parameters.values())
        if not count:
            return []
        parts = "; ".join(f"{number:,} {reason}" for reason, number in self.parameters.items())
        return [f"left as they are   {count:,} parameters, {count / self.total:.1%} of the model: {parts}"]


def _reason(
    name: str, modules: dict[str, nn.Module], own: Container[str], read: Container[str], shared: Container[str]
) -> str:
    holder, _, leaf = name.rpartition(".")
    if name in own:
        module = modules[holder]
        kind = type(module).__name__
        if holder in read:
            return f"in {kind} layers whose weights the model reads itself"
        if name in shared:
            return f"in {kind} layers that several blocks share"
        return f"in {kind} layers outside the blocks" if leaf == "weight" and is_linear(module) else f"in {kind}"
    stem, _, _ = re.sub(r"\.\d+(?=\.)", ".*", name).rpartition(".*")
    return f"in {f'{stem}.*' if stem else name}, which transformers fuses with others while it loads"
