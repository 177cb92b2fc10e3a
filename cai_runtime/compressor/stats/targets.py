"""The linear layers of a transformers model to factorize, and those among them with the same input."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cai_runtime.errors import UnsupportedModelError
from cai_runtime.integrations.stand_in import is_linear


@dataclass(frozen=True)
class Target:
    """One linear layer y = W x + b of a block.

    name: in the model, as in `DenseWeights`. module: a torch.nn.Linear (see `is_linear`), or a `TrainableLinear` in its
    place.
    """

    name: str
    module: Any


@dataclass(frozen=True)
class InputGroup:
    """Targets with the same input tensor (q, k and v; gate and up), which share one Gram matrix [in, in]."""

    targets: tuple[Target, ...]

    @property
    def in_features(self) -> int:
        return self.targets[0].module.in_features


def find_targets(model: nn.Module, stacks: Sequence[str], stored: Container[str]) -> dict[str, Target]:
    """The linear layers in the blocks whose weights are in the checkpoint under the model's own names, by name. Without
    weights that several blocks share: compressing one for its block would change the others.

    stacks: names of the lists of blocks. stored: names of the checkpoint's tensors.

    Raises UnsupportedModelError when there is none.
    """
    shared = shared_weights(model)
    targets = {
        f"{stack}.{name}": Target(f"{stack}.{name}", module)
        for stack in stacks
        for name, module in model.get_submodule(stack).named_modules()
        if is_linear(module) and f"{stack}.{name}.weight" in stored and f"{stack}.{name}.weight" not in shared
    }
    if not targets:
        raise UnsupportedModelError(
            f"none of the linear layers of {type(model).__name__} ({', '.join(stacks)}) is in the checkpoint under its own "
            "name: transformers renames or fuses them while it loads, so they match no layer. Take a "
            "checkpoint of the language model alone, or of another architecture"
        )
    return targets


def shared_weights(model: nn.Module) -> set[str]:
    """All names of the linear weights that occur in several places of the model."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names.setdefault(id(module), []).append(f"{name}.weight")
    return {*tied, *tied.values()}.union(*(same for same in names.values() if len(same) > 1))


def matrices_by_class(modules: Iterable[nn.Module]) -> str:
    """For messages: the module classes that own matrices, by falling parameter count."""
    found: dict[str, int] = {}
    for module in modules:
        count = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
        if count:
            found[type(module).__name__] = found.get(type(module).__name__, 0) + count
    return ", ".join(f"{name} ({found[name]:,} parameters)" for name in sorted(found, key=lambda n: -found[n]))
