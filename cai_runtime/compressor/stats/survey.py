"""Checks that a model can be compressed block by block, before the work begins.

Block-by-block compression requires that blocks pass nothing but hidden states to each other. Some architectures also pass
keys and values, or positions to attend to. So one sequence runs through the model twice, as transformers runs it and block
by block, and the results must agree. The check also finds layers whose weights the model reads without calling the layer
(Mamba's `dt_proj`). They must stay dense, because a slim checkpoint has cores in place of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cai_runtime.compressor.stats.block_stack import Batch, BlockModel
from cai_runtime.compressor.stats.targets import Target
from cai_runtime.compressor.train.logit_slices import states_of
from cai_runtime.errors import CompressionError, UnsupportedModelError

# Functions of a weight that do not depend on its values. Any other function counts as reading the weight.
HARMLESS = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "is_meta", "layout", "is_leaf")
) | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}
# Errors that transformers' code raises when a value that another block should have left is missing.
RAISED = (TypeError, AttributeError, LookupError, ValueError, AssertionError, NotImplementedError, RuntimeError)


@torch.no_grad()
def check_blocks(model: BlockModel, targets: Mapping[str, Target], batch: Batch, *, heal: bool) -> set[str]:
    """The names of the targets whose weights the model reads without calling the layer. Loads every block twice.

    batch: its first sequence is used. heal: also check that the head can run alone.

    Raises UnsupportedModelError when block-by-block results differ from transformers', CompressionError when transformers
    can't run the model.
    """
    kind = type(model.model).__name__
    one = {key: value[:1] for key, value in batch.items()}
    ends: dict[tuple[int, int], torch.Tensor] = {}
    read: set[str] = set()

    @contextmanager
    def watch(s: int, index: int, block: nn.Module) -> Iterator[Callable[[torch.Tensor | None], object]]:
        inside = f"{model.stacks[s].block_name(index)}."
        with _Reads({name: t.module for name, t in targets.items() if name.startswith(inside)}) as reads:
            # The last position suffices: in a causal model it depends on all others.
            yield lambda states: ends.update({(s, index): states[:, -1].clone()} if states is not None else {})
        read.update(reads.read)

    try:
        # This watch also covers reads outside the blocks: RWKV rescales weights before it runs them.
        with _Reads({name: target.module for name, target in targets.items()}) as reads:
            logits = model.streamed(one, watch).logits[:, -1]
        read.update(reads.read)
    except torch.OutOfMemoryError:
        raise
    except RAISED as e:
        raise CompressionError(f"transformers can't run {kind} on the calibration text: {type(e).__name__}: {e}") from e
    try:
        finals: list[torch.Tensor] = []
        for s, stack in enumerate(model.stacks):
            entry = model.enter(s, one, finals)
            states = entry.hidden
            for index in range(len(stack)):
                with model.loaded(stack, index) as block:
                    states = entry.calls[index](block, states)
                _compare(kind, stack.block_name(index), ends.get((s, index)), states[:, -1])
            finals.append(states)
        _compare(kind, "its head", logits, model.finish(one, finals).logits[:, -1])
        if heal:
            with model.known(one, finals):
                known = states_of(model.model, one)
            _compare(kind, "its head by itself", logits, known.logits(known.hidden[0, -1:]))
    except torch.OutOfMemoryError:
        raise
    except RAISED as e:
        raise UnsupportedModelError(_unsupported_message(kind, f"the model stops with {type(e).__name__}: {e}")) from e
    return read


def _compare(kind: str, name: str, wanted: torch.Tensor | None, found: torch.Tensor) -> None:
    # Both run the same operations. The tolerance allows for the order of sums on some devices.
    most = torch.finfo(found.dtype).eps ** 0.5
    if wanted is None or float((wanted - found).float().norm()) > most * float(wanted.float().norm()):
        raise UnsupportedModelError(_unsupported_message(kind, f"the output of {name} differs"))


def _unsupported_message(kind: str, what: str) -> str:
    return (
        f"{kind} can't be compressed block by block: its blocks pass each other more than hidden states (keys and values, "
        f"or a choice of positions), and without it {what}. Take a model of another architecture"
    )


class _Reads(TorchFunctionMode):
    """While open, collects in `read` the names of layers whose weights are used outside the layer's own forward function."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.read: set[str] = set()
        self._running: set[str] = set()
        self._weights = [layer.weight for layer in layers.values()]  # references keep the ids unique
        self._names = {id(weight): name for weight, name in zip(self._weights, layers, strict=True)}
        self._layers = layers
        self._hooks = ExitStack()

    def __enter__(self) -> _Reads:
        for name, layer in self._layers.items():
            before = layer.register_forward_pre_hook(lambda *_, _name=name: self._running.add(_name))
            after = layer.register_forward_hook(lambda *_, _name=name: self._running.discard(_name))
            self._hooks.callback(before.remove)
            self._hooks.callback(after.remove)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._hooks.close()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in HARMLESS:
            for value in (*args, *(kwargs or {}).values()):
                name = self._names.get(id(value))
                if name is not None and name not in self._running:
                    self.read.add(name)
        return func(*args, **(kwargs or {}))
