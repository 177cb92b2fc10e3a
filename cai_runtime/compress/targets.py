"""Which linear layers of a transformers model are factorized, and which of them read the same input."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cai_runtime.errors import UnsupportedModelError


@dataclass(frozen=True)
class Target:
    """One linear layer y = W x + b of a decoder block. `name`: its name in the model and in the checkpoint. `module`: a
    torch.nn.Linear, or a `TrainableLinear` in its place."""

    name: str
    module: Any


@dataclass(frozen=True)
class InputGroup:
    """Targets that read the very same tensor (q, k and v; gate and up): one Gram matrix [in, in] serves them all."""

    targets: tuple[Target, ...]

    @property
    def in_features(self) -> int:
        return self.targets[0].module.in_features


def find_targets(model: nn.Module, stacks: Sequence[str], stored: Container[str]) -> dict[str, Target]:
    """Every linear layer inside the blocks whose weight lies in the checkpoint under the model's own name, by name.

    stacks: names of the lists of blocks. stored: names of the checkpoint's tensors.
    Raises UnsupportedModelError when there is none.
    """
    targets = {
        f"{stack}.{name}": Target(f"{stack}.{name}", module)
        for stack in stacks
        for name, module in model.get_submodule(stack).named_modules()
        if type(module) is nn.Linear and f"{stack}.{name}.weight" in stored
    }
    if not targets:
        raise UnsupportedModelError(
            f"none of the linear layers of {type(model).__name__} ({', '.join(stacks)}) is in the checkpoint "
            "under its own name"
        )
    return targets
