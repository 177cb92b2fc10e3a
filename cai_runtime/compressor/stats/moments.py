"""Second moments of the linear layers of one block: of their inputs, and of the loss gradients at their outputs.

Products are summed in fp32 within a batch and in fp64 over batches; the means are fp32. The Gram matrix of a wide layer
takes gigabytes, so a sum holds only its lower half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from cai_runtime.compressor.stats.targets import InputGroup, Target
from cai_runtime.errors import CompressionError

STRIP = 384  # rows of the Gram matrix computed at a time, up to the diagonal


class GramSum:
    """The running sum of x x^T over vectors x, [features, features], fp64, as strips of its lower half."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.rows = 0
        self._features = features
        self._strips = [
            torch.zeros(stop - start, stop, dtype=torch.float64, device=device) for start, stop in _strips(features)
        ]

    def add(self, x: torch.Tensor) -> None:
        """Add a batch x [..., features], any float dtype."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        for strip, (start, stop) in zip(self._strips, _strips(self._features), strict=True):
            strip += x[:, start:stop].mT @ x[:, :stop]
        self.rows += x.shape[0]

    def mean(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The mean of x x^T, [features, features], symmetric; zeros without batches."""
        whole = self._strips[0].new_empty(self._features, self._features, dtype=dtype)
        for strip, (start, stop) in zip(self._strips, _strips(self._features), strict=True):
            mean = strip / max(self.rows, 1)
            corner = mean[:, start:].tril()
            whole[start:stop, :start] = mean[:, :start]
            whole[:start, start:stop] = mean[:, :start].mT
            whole[start:stop, start:stop] = corner + corner.tril(-1).mT
        return whole


def _strips(features: int) -> list[tuple[int, int]]:
    return [(start, min(start + STRIP, features)) for start in range(0, features, STRIP)]


@dataclass
class BlockMoments:
    """Moments of one block, by target name.

    inputs: mean of x x^T, [in, in] fp32; targets with the same input share one tensor. outputs: mean of g g^T, [out, out]
    fp32; empty without gradients. rows: number of vectors x.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def tensors(self, groups: Sequence[InputGroup]) -> dict[str, torch.Tensor]:
        """The tensors for the work directory. A group's input moment is stored once, under its first target's name."""
        kept = {f"in:{g.targets[0].name}": self.inputs[g.targets[0].name] for g in groups}
        return {**kept, **{f"out:{name}": gram for name, gram in self.outputs.items()}}

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], groups: Sequence[InputGroup], rows: dict[str, int]) -> BlockMoments:
        """The inverse of `tensors`."""
        inputs: dict[str, torch.Tensor] = {}
        for group in groups:
            gram = tensors[f"in:{group.targets[0].name}"]
            inputs |= {target.name: gram for target in group.targets}
        outputs = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("out:")}
        return cls(inputs, outputs, rows)


class MomentHooks:
    """Hooks that accumulate moments: while `open`, forward passes add inputs, backward passes add gradients."""

    def __init__(self, groups: Sequence[InputGroup], *, gradients: bool, device: torch.device):
        self._groups = groups
        self._inputs = {g.targets[0].name: GramSum(g.in_features, device) for g in groups}
        self._outputs = {t.name: GramSum(t.module.out_features, device) for g in groups for t in g.targets if gradients}

    @contextmanager
    def open(self) -> Iterator[None]:
        handles = []
        for group in self._groups:
            for target in group.targets:
                hook = _feed(self._inputs.get(target.name), self._outputs.get(target.name))
                handles.append(target.module.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def moments(self) -> BlockMoments:
        """The moments of all passes. Empties the sums, so call it once. Raises CompressionError when an activation or a
        gradient was not finite."""
        found = BlockMoments()
        for group in self._groups:
            total = self._inputs.pop(group.targets[0].name)
            gram = total.mean(torch.float32)
            for target in group.targets:
                found.inputs[target.name], found.rows[target.name] = gram, total.rows
                if target.name in self._outputs:
                    found.outputs[target.name] = self._outputs.pop(target.name).mean(torch.float32)
        for name, gram in [*found.inputs.items(), *found.outputs.items()]:
            if not bool(gram.isfinite().all()):
                raise CompressionError(f"calibration met values that are not finite ({name}): try --dtype fp32")
        return found


def _feed(total: GramSum | None, gradient: GramSum | None):
    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if total is not None:
            total.add(args[0])
        if gradient is not None and output.requires_grad:
            output.register_hook(gradient.add)

    return hook


class _StopForward(Exception):
    """Ends a forward pass early."""


@contextmanager
def noting_inputs(targets: Sequence[Target], *, stop: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """While open, records the input tensors of the targets by name, in call order. stop: end the forward pass, and with it
    the context, at the first target."""
    read: dict[str, torch.Tensor] = {}

    def note(name: str):
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            read[name] = args[0].detach()
            if stop:
                raise _StopForward

        return hook

    handles = [target.module.register_forward_pre_hook(note(target.name)) for target in targets]
    try:
        yield read
    except _StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


def group_by_input(targets: Sequence[Target], read: dict[str, torch.Tensor]) -> list[InputGroup]:
    """The targets grouped by input tensor, in call order.

    read: from `noting_inputs`, of one forward pass. A target that was not called (an expert that was not routed to) is a
    group of its own, at the end.
    """
    by_name = {target.name: target for target in targets}
    groups: dict[object, list[Target]] = {}
    for name, tensor in read.items():
        groups.setdefault((tensor.data_ptr(), tensor.shape), []).append(by_name[name])
    for name, target in by_name.items():
        if name not in read:
            groups[name] = [target]
    return [InputGroup(tuple(members)) for members in groups.values()]
