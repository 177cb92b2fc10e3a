"""What a compression leaves as it is, and why: matrices that are in no compressed layer, nor in embedding or head.

A fused mixture of experts holds most of a model's parameters in one tensor for all experts, which is no linear layer: "keep"
says nothing of it, so plan and report have to.
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
    """parameters: by reason, the largest share first. total: of the model."""

    parameters: dict[str, int]
    total: int

    @classmethod
    def of(cls, model: Any, weights: DenseWeights, targets: dict[str, Target], read: Container[str] = ()) -> Left:
        """read: layers that are no targets because the model reads their weights itself."""
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
        """For people: nothing, or what is left dense."""
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
