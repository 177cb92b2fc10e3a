"""A transformers model as stacks of blocks, with one block at a time in memory.

The skeleton is transformers' own model. Embeddings, norms and head have their weights; blocks stay on the meta device until
they are loaded. The code around the blocks (masks, position embeddings, the last norm, cross attention) runs unchanged, with
the blocks' forward functions patched. `BlockModel.enter` records the arguments of every block. `BlockModel.finish` patches
the last block to return hidden states that were computed block by block. A patched block returns the same structure as the
real first block of its stack: a tensor, or a tuple that begins with one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cai_runtime.compressor.stats.targets import matrices_by_class
from cai_runtime.compressor.stats.weights import DenseWeights
from cai_runtime.errors import UnsupportedModelError
from cai_runtime.integrations.stand_in import is_linear

Batch = dict[str, torch.Tensor]
Watch = Callable[[int, int, nn.Module], AbstractContextManager[Callable[[torch.Tensor | None], object]]]


@dataclass(frozen=True)
class Stack:
    """A list of blocks that run one after another. name: of the list in the model, such as "model.layers"."""

    name: str
    blocks: nn.ModuleList

    def __len__(self) -> int:
        return len(self.blocks)

    def block_name(self, index: int) -> str:
        return f"{self.name}.{index}"


@dataclass
class Call:
    """A block's arguments beside the hidden states. Calling it runs the block: [batch, tokens, hidden] to the same shape."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class Entry:
    """The inputs of one stack for one batch: the hidden states before its first block, [batch, tokens, hidden], and the
    `Call` of each block."""

    hidden: torch.Tensor
    calls: list[Call]


class BlockModel:
    """A causal language model or an encoder-decoder whose blocks are loaded one at a time.

    model: transformers' model, with the parameters of its blocks on the meta device or all resident. weights: source of the
    blocks' parameters. dtype, device: of loaded blocks.
    """

    def __init__(self, model: Any, weights: DenseWeights, dtype: torch.dtype, device: torch.device):
        self.model = model
        self.weights = weights
        self.dtype = dtype
        self.device = device
        self.stacks = find_stacks(model)
        # For each stack run so far: number of values that its blocks return behind the hidden states, in a tuple; None: the
        # blocks return a tensor.
        self._beside: list[int | None] = []

    @contextmanager
    def loaded(self, stack: Stack, index: int) -> Iterator[nn.Module]:
        """The block, with its weights on `device` while the context is open."""
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
        """The entry of stack `at` for a batch. finals: the outputs of the stacks before it, [batch, tokens, hidden] each.

        Gradients flow back to those finals that require them. Raises UnsupportedModelError when the model skips or repeats
        blocks.
        """
        stack = self.stacks[at]
        calls: list[Call] = []
        first: list[torch.Tensor] = []
        self._look(batch, at)

        def note(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not calls:
                first.append(hidden)
            calls.append(Call(tuple(map(_own, args)), {key: _own(value) for key, value in kwargs.items()}))
            if len(calls) == len(stack):
                raise _Stopped
            return self._returned(at, hidden)

        with ExitStack() as patches:
            self._replay(patches, finals)
            for block in stack.blocks:
                patches.enter_context(patched(block, note))
            with suppress(_Stopped):
                self.run(batch)
        if len(calls) != len(stack):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} runs {len(calls)} of the {len(stack)} blocks of {stack.name}: a model that "
                "skips or repeats blocks can't be compressed block by block"
            )
        return Entry(first[0], calls)

    def finish(self, batch: Batch, finals: Sequence[torch.Tensor]) -> Any:
        """The model's output on a batch. finals: the output of every stack's last block."""
        with self.known(batch, finals):
            return self.run(batch)

    @contextmanager
    def known(self, batch: Batch, finals: Sequence[torch.Tensor]) -> Iterator[None]:
        """While open, the model's stacks return `finals`. batch: the batch they belong to."""
        self._look(batch, len(self.stacks) - 1)
        with ExitStack() as patches:
            self._replay(patches, finals)
            yield

    def streamed(self, batch: Batch, watch: Watch) -> Any:
        """The model's output as transformers computes it, loading each block for its call only.

        watch: called as watch(stack index, block index, block), a context around each block call. It yields a function that
        receives the hidden states of the call's result, or None if they were not found.
        """

        def through(s: int, index: int) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                stack = self.stacks[s]
                with self.loaded(stack, index) as block, watch(s, index, block) as show:
                    output = type(block).forward(block, *args, **kwargs)
                    show(_states(output))
                    return output

            return run

        with ExitStack() as patches:
            for s, stack in enumerate(self.stacks):
                for index, block in enumerate(stack.blocks):
                    patches.enter_context(patched(block, through(s, index)))
            return self.run(batch)

    def run(self, batch: Batch) -> Any:
        """Run the whole model on a batch, without a KV cache and without the batch's "labels"."""
        inputs = {key: value.to(self.device) for key, value in batch.items() if key != "labels"}
        return self.model(**inputs, use_cache=False)

    def _replay(self, patches: ExitStack, finals: Sequence[torch.Tensor]) -> None:
        """Patch one stack per final to return it: the last block returns the final, the others their input."""

        def identity(s: int) -> Any:
            return lambda hidden, *_args, **_kwargs: self._returned(s, hidden)

        def known(s: int, final: torch.Tensor) -> Any:
            return lambda *_args, **_kwargs: self._returned(s, final)

        for s, (stack, final) in enumerate(zip(self.stacks, finals, strict=False)):
            for block in stack.blocks[:-1]:
                patches.enter_context(patched(block, identity(s)))
            patches.enter_context(patched(stack.blocks[-1], known(s, final)))

    def _returned(self, s: int, hidden: torch.Tensor) -> Any:
        """Hidden states in the structure that blocks of stack s return."""
        beside = self._beside[s]
        return hidden if beside is None else (hidden, *[None] * beside)

    @torch.no_grad()
    def _look(self, batch: Batch, last: int) -> None:
        """Run the first block of all stacks up to `last`, to see the structure that their blocks return.

        Raises UnsupportedModelError when that is neither a tensor nor a tuple that begins with one.
        """
        while len(self._beside) <= last:
            s = len(self._beside)
            stack = self.stacks[s]
            seen: list[Any] = []

            def first(*args: Any, _stack: Stack = stack, _seen: list[Any] = seen, **kwargs: Any) -> Any:
                with self.loaded(_stack, 0) as block:
                    _seen.append(type(block).forward(block, *args, **kwargs))
                raise _Stopped

            with ExitStack() as patches:
                for before, passed in enumerate(self.stacks[:s]):
                    for block in passed.blocks:
                        patches.enter_context(
                            patched(block, lambda hidden, *_a, _s=before, **_k: self._returned(_s, hidden))
                        )
                patches.enter_context(patched(stack.blocks[0], first))
                with suppress(_Stopped):
                    self.run(batch)
            output = seen[0] if seen else None
            if seen and _states(output) is None:
                raise UnsupportedModelError(
                    f"{stack.block_name(0)} of {type(self.model).__name__} returns a {type(output).__name__}, not its "
                    "hidden states: the model can't be compressed block by block"
                )
            # `enter` raises for a stack that does not run.
            self._beside.append(len(output) - 1 if isinstance(output, tuple) else None)


class _Stopped(Exception):
    """Ends a forward pass early."""


@contextmanager
def patched(module: nn.Module, forward: Any) -> Iterator[None]:
    """While open, this module object has another forward function."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _own(value: Any) -> Any:
    """A copy of a container argument, other values as they are. A block may write to a container that the next block reads.
    Block-by-block runs lose such writes; with copies, `check_blocks` detects this."""
    return copy.copy(value) if isinstance(value, (MutableMapping, MutableSequence)) else value


def _states(output: Any) -> torch.Tensor | None:
    """The hidden states in a block's output: the output or its first element; None if that is no tensor."""
    states = output[0] if isinstance(output, tuple) and output else output
    return states if isinstance(states, torch.Tensor) else None


def _set_parameter(module: nn.Module, key: str, value: torch.Tensor) -> None:
    parent, _, leaf = key.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def find_stacks(model: Any) -> list[Stack]:
    """The outermost module lists whose blocks have linear layers, in the model's order. Of a multimodal model, those of the
    language model.

    Raises UnsupportedModelError when there is none.
    """
    found: list[Stack] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack.name}.") for stack in found)
        # A list whose elements are linear layers themselves is not a list of blocks.
        linears = (m for block in module.children() for m in block.modules() if m is not block and is_linear(m))
        if isinstance(module, nn.ModuleList) and not inside and next(linears, None) is not None:
            found.append(Stack(name, module))
    found = _of_text(model, found)
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks with torch.nn.Linear layers, so nothing of it can be factorized: "
            f"its matrices are in {matrices_by_class(model.modules()) or 'no module'}. Take a model whose layers are "
            "torch.nn.Linear"
        )
    return found


def all_there(skeleton: nn.Module, weights: DenseWeights) -> bool:
    """Whether the checkpoint has every parameter under the model's own name, so that blocks can be loaded one at a time."""
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    return all(key in weights or key in tied for key, _ in skeleton.named_parameters())


def _of_text(model: Any, stacks: list[Stack]) -> list[Stack]:
    """The stacks in the smallest submodule that contains the input embedding and a stack: a vision tower lies outside it.
    All stacks of an encoder-decoder."""
    table = model.get_input_embeddings()
    if getattr(model.config, "is_encoder_decoder", False) or table is None:
        return stacks
    parent = next((name for name, module in model.named_modules() if module is table), "")
    while parent:
        parent = parent.rpartition(".")[0]
        inside = [stack for stack in stacks if stack.name.startswith(f"{parent}." if parent else "")]
        if inside:
            return inside
    return stacks


def open_model(weights: DenseWeights, *, dtype: torch.dtype, device: str | torch.device) -> BlockModel:
    """Build the model of a checkpoint with its blocks left on disk.

    Loads the whole model where transformers renames or fuses tensors while loading, as it does for some families.

    Raises CompressionError when transformers can't build or load it, UnsupportedModelError when it has no blocks.
    """
    device = torch.device(device)
    skeleton: Any = weights.skeleton(dtype)
    skeleton.tie_weights()
    model = BlockModel(skeleton, weights, dtype, device)
    inside = tuple(f"{stack.name}." for stack in model.stacks)
    wanted = [key for key, _ in skeleton.named_parameters()]
    if not all_there(skeleton, weights):
        return BlockModel(weights.resident(dtype).to(device), weights, dtype, device)
    for key in wanted:
        if not key.startswith(inside):
            _set_parameter(skeleton, key, weights.tensor(key).to(device, dtype, copy=True))
    skeleton.tie_weights()  # again, to the parameters set above
    for key, buffer in list(skeleton.named_buffers()):
        if not buffer.is_meta:
            parent, _, leaf = key.rpartition(".")
            module = skeleton.get_submodule(parent)
            kept = buffer if key not in weights else weights.tensor(key)
            module._buffers[leaf] = kept.to(device)
    skeleton.eval().requires_grad_(False)
    return model
