"""What a compression block by block takes for granted of a model, looked at before the work begins.

Nothing tells whether an architecture passes hidden states alone from block to block: some hand on keys and values, or which
positions to attend to. So one sequence goes through the model twice, as transformers runs it and block by block, and both
must come to the same. On the way it is seen which layers' weights the model reads without calling the layer (Mamba's
`dt_proj`): in a slim checkpoint there would be cores in their place.
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

# Of a weight, what says nothing of its values; anything else that takes it counts as reading it.
HARMLESS = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "is_meta", "layout", "is_leaf")
) | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}
# What transformers' code raises when it does not find what another block should have left.
RAISED = (TypeError, AttributeError, LookupError, ValueError, AssertionError, NotImplementedError, RuntimeError)


@torch.no_grad()
def check_blocks(model: BlockModel, targets: Mapping[str, Target], batch: Batch, *, heal: bool) -> set[str]:
    """Names of the targets whose weights the model reads itself. batch: of which the first sequence is taken. heal: see that
    the head can be run alone, too. Every block is loaded twice.

    Raises UnsupportedModelError when the model run block by block is another than transformers', CompressionError when
    transformers can't run it.
    """
    kind = type(model.model).__name__
    one = {key: value[:1] for key, value in batch.items()}
    ends: dict[tuple[int, int], torch.Tensor] = {}
    read: set[str] = set()

    @contextmanager
    def watch(s: int, index: int, block: nn.Module) -> Iterator[Callable[[torch.Tensor | None], object]]:
        inside = f"{model.stacks[s].block_name(index)}."
        with _Reads({name: t.module for name, t in targets.items() if name.startswith(inside)}) as reads:
            # The last position is enough: in a causal model it sees all others.
            yield lambda states: ends.update({(s, index): states[:, -1].clone()} if states is not None else {})
        read.update(reads.read)

    try:
        # Between the blocks, too: RWKV changes weights before it runs them.
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
    # The same operations on the same numbers; what is left is the order of sums on some devices.
    most = torch.finfo(found.dtype).eps ** 0.5
    if wanted is None or float((wanted - found).float().norm()) > most * float(wanted.float().norm()):
        raise UnsupportedModelError(_unsupported_message(kind, f"{name} gives something else"))


def _unsupported_message(kind: str, what: str) -> str:
    return (
        f"{kind} can't be compressed block by block: its blocks give each other more than hidden states (keys and values, "
        f"or a choice of positions), and without it {what}. Take a model of another architecture"
    )


class _Reads(TorchFunctionMode):
    """While open, notes which layers' weights are used outside of the layer's own forward function. read: their names."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.read: set[str] = set()
        self._running: set[str] = set()
        self._weights = [layer.weight for layer in layers.values()]  # held, so that no other tensor gets its address
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
