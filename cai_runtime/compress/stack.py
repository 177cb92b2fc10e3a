"""A model as stacks of blocks, of which one block at a time is in memory.

The skeleton is transformers' own model: embeddings, norms and head have their weights, the blocks lie on the meta
device until one is wanted. What the model does around its blocks (masks, position embeddings, the last norm, the way
from an encoder to a decoder) is run as it is, with the blocks' forward functions replaced: `calls` learns so what each
block is given, and a replaced last block hands in hidden states that were computed block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cai_runtime.compress.weights import DenseWeights
from cai_runtime.errors import UnsupportedModelError

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Stack:
    """A run of blocks, each of which takes the hidden states of the one before. name: of their list in the model."""

    name: str
    blocks: nn.ModuleList

    def __len__(self) -> int:
        return len(self.blocks)

    def block_name(self, index: int) -> str:
        return f"{self.name}.{index}"


@dataclass
class Call:
    """What a block is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class Entry:
    """The way into a stack for one batch: the hidden states its first block is given, [batch, tokens, hidden], and each
    block's call."""

    hidden: torch.Tensor
    calls: list[Call]


class BlockModel:
    """A causal language model or an encoder-decoder whose blocks are loaded one at a time.

    model: transformers' model with its blocks' parameters on the meta device, or all of it resident. weights: where
    they come from. dtype, device: of the blocks when they are loaded.
    """

    def __init__(self, model: Any, weights: DenseWeights, dtype: torch.dtype, device: torch.device):
        self.model = model
        self.weights = weights
        self.dtype = dtype
        self.device = device
        self.stacks = find_stacks(model)

    @contextmanager
    def loaded(self, stack: Stack, index: int) -> Iterator[nn.Module]:
        """The block with its weights, for as long as the context lasts."""
        block, name = stack.blocks[index], stack.block_name(index)
        away = [key for key, parameter in block.named_parameters() if parameter.is_meta]
        for key in away:
            value = self.weights.tensor(f"{name}.{key}").to(self.device, self.dtype, copy=True)
            _set_parameter(block, key, value)
            self.weights.release(f"{name}.{key}")
        try:
            yield block
        finally:
            for key in away:
                _set_parameter(block, key, dict(block.named_parameters())[key].to("meta"))

    def enter(self, at: int, batch: Batch, finals: Sequence[torch.Tensor] = ()) -> Entry:
        """The way into stack `at`. finals: the outputs of the stacks before it, from their last blocks.

        Nothing is differentiated, unless a final requires it.
        """
        stack = self.stacks[at]
        calls: list[Call] = []
        first: list[torch.Tensor] = []

        def note(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not calls:
                first.append(hidden)
            calls.append(Call(args, kwargs))
            if len(calls) == len(stack):
                raise _Stopped
            return hidden

        with ExitStack() as patches:
            self._replay(patches, finals)
            for index in range(len(stack)):
                patches.enter_context(_patched(stack.blocks[index], note))
            with suppress(_Stopped):
                self.run(batch)
        if len(calls) != len(stack):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} runs {len(calls)} of the {len(stack)} blocks of {stack.name}: a model that "
                "skips or repeats blocks can't be compressed block by block"
            )
        return Entry(first[0], calls)

    def finish(self, batch: Batch, finals: Sequence[torch.Tensor]) -> Any:
        """The model's output, given the outputs of every stack's last block."""
        with ExitStack() as patches:
            self._replay(patches, finals)
            return self.run(batch)

    def run(self, batch: Batch) -> Any:
        """The whole model on a batch, without a KV cache. Labels are for the loss and not handed in."""
        inputs = {key: value.to(self.device) for key, value in batch.items() if key != "labels"}
        return self.model(**inputs, use_cache=False)

    def _replay(self, patches: ExitStack, finals: Sequence[torch.Tensor]) -> None:
        """Make stacks return what is known already: every block hands on its input, the last one the known states."""

        def identity(hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
            return hidden

        for stack, final in zip(self.stacks, finals, strict=False):
            for block in stack.blocks[:-1]:
                patches.enter_context(_patched(block, identity))
            patches.enter_context(_patched(stack.blocks[-1], lambda *_args, _final=final, **_kwargs: _final))


class _Stopped(Exception):
    """The rest of the model is not needed."""


@contextmanager
def _patched(block: nn.Module, forward: Any) -> Iterator[None]:
    """A block with another forward function, in this object alone."""
    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def _set_parameter(module: nn.Module, key: str, value: torch.Tensor) -> None:
    parent, _, leaf = key.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def find_stacks(model: nn.Module) -> list[Stack]:
    """The lists of blocks with linear layers, in the model's order: those that lie in no other such list.

    Raises UnsupportedModelError when there is none.
    """
    found: list[Stack] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack.name}.") for stack in found)
        if isinstance(module, nn.ModuleList) and not inside and any(type(m) is nn.Linear for m in module.modules()):
            found.append(Stack(name, module))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks with torch.nn.Linear layers: nothing to factorize"
        )
    return found


def open_model(weights: DenseWeights, *, dtype: torch.dtype, device: str | torch.device) -> BlockModel:
    """Build the model of a checkpoint with its blocks left on disk.

    Where the checkpoint's names are not the model's own (transformers converts some families while loading) the whole
    model is loaded.

    Raises CompressionError when transformers can't build or load it, UnsupportedModelError when it has no blocks.
    """
    device = torch.device(device)
    skeleton: Any = weights.skeleton(dtype)
    skeleton.tie_weights()
    model = BlockModel(skeleton, weights, dtype, device)
    inside = tuple(f"{stack.name}." for stack in model.stacks)
    wanted = [key for key, _ in skeleton.named_parameters()]
    if any(key not in weights for key in wanted):
        return BlockModel(weights.resident(dtype).to(device), weights, dtype, device)
    for key in wanted:
        if not key.startswith(inside):
            _set_parameter(skeleton, key, weights.tensor(key).to(device, dtype, copy=True))
    skeleton.tie_weights()  # to what has just been put in
    for key, buffer in list(skeleton.named_buffers()):
        if not buffer.is_meta:
            parent, _, leaf = key.rpartition(".")
            module = skeleton.get_submodule(parent)
            kept = buffer if key not in weights else weights.tensor(key)
            module._buffers[leaf] = kept.to(device)
    skeleton.eval().requires_grad_(False)
    return model
