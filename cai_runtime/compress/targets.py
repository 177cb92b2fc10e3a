"""Which linear layers of a transformers model are factorized, and which of them read the same input."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import nn

from cai_runtime.errors import UnsupportedModelError


@dataclass(frozen=True)
class Target:
    """One linear layer y = W x + b of a decoder block. `name`: its name in the model and in the checkpoint."""

    name: str
    module: nn.Linear


@dataclass(frozen=True)
class InputGroup:
    """Targets that read the very same tensor (q, k and v; gate and up): one Gram matrix [in, in] serves them all."""

    targets: tuple[Target, ...]

    @property
    def in_features(self) -> int:
        return self.targets[0].module.in_features


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's blocks: the ModuleList of most parameters that holds blocks with linear layers.

    Raises UnsupportedModelError when there is none.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(type(m) is nn.Linear for m in module.modules()):
            size = sum(p.numel() for p in module.parameters())
            if best is None or size > best[0]:
                best = (size, name, module)
    if best is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder blocks with torch.nn.Linear layers: nothing to factorize"
        )
    return best[1], best[2]


def find_targets(model: nn.Module, stored: Container[str]) -> list[Target]:
    """Every linear layer inside the decoder blocks whose weight lies in the checkpoint under the model's own name.

    stored: names of the checkpoint's tensors.
    Raises UnsupportedModelError when there is none.
    """
    prefix, blocks = decoder_blocks(model)
    targets = [
        Target(f"{prefix}.{name}", module)
        for name, module in blocks.named_modules()
        if type(module) is nn.Linear and f"{prefix}.{name}.weight" in stored
    ]
    if not targets:
        raise UnsupportedModelError(
            f"none of the linear layers of {type(model).__name__} ({prefix}) is in the checkpoint under its own name"
        )
    return targets


@torch.inference_mode()
def group_by_input(model: nn.Module, targets: list[Target], token_ids: torch.Tensor) -> list[InputGroup]:
    """Run `token_ids` [1, tokens] through the model once and group the targets by the tensor they read.

    A target that these tokens do not reach (an expert that was not chosen) is a group of its own.
    """
    read: dict[str, int] = {}
    inputs: list[torch.Tensor] = []  # kept until the end: a freed tensor's id may be taken by the next one

    def note(name: str):
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs.append(args[0])
            read[name] = id(args[0])

        return hook

    hooks = [target.module.register_forward_pre_hook(note(target.name)) for target in targets]
    try:
        model(input_ids=token_ids, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    groups: dict[int | str, list[Target]] = {}
    for target in targets:
        groups.setdefault(read.get(target.name, target.name), []).append(target)
    return [InputGroup(tuple(members)) for members in groups.values()]
