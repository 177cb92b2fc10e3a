"""Compresses a model block by block, front to back, each block on the hidden states of the compressed blocks before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cai_runtime.compressor.factor.choice import Choice
from cai_runtime.compressor.factor.cores import dense_module, factorized_module, mpo_module
from cai_runtime.compressor.factor.decompose import OUTPUT_DAMPING, damped, factorize
from cai_runtime.compressor.factor.mpo import MpoTrain
from cai_runtime.compressor.stats.block_stack import BlockModel, Call, Entry
from cai_runtime.compressor.stats.calibrate import BlockId, CalibrationPass
from cai_runtime.compressor.stats.moments import BlockMoments, GramSum, noting_inputs
from cai_runtime.compressor.stats.targets import InputGroup, Target
from cai_runtime.compressor.train.optimizer import core_metrics
from cai_runtime.compressor.train.refine import ShiftedMoments, refine_block, refine_steps
from cai_runtime.compressor.train.student import TrainableLinear, replace_module
from cai_runtime.compressor.work import Work
from cai_runtime.errors import UnsupportedModelError
from cai_runtime.slim.spec import ModuleSpec


@dataclass(frozen=True)
class BlockSettings:
    """Settings of `BlockwiseCompressor`.

    shift: fit each layer to the inputs that the compressed layers before it give. epochs: passes of refinement, 0: none.
    rate: see `refine_block`. mixed: refine in mixed precision. curvature: weight errors by loss gradients. seed: of the
    order of the batches.
    """

    shift: bool
    epochs: int
    rate: float
    mixed: bool
    curvature: bool
    seed: int


class BlockwiseCompressor:
    """Compresses blocks one after another. The step "cores-s-i" in the work directory holds a block's trainable cores.

    choices: kind, rank and store of every layer, by name. moments: returns a block's input groups and moments, loaded or
    computed. tick: called with the units of progress, see `ticks`.
    """

    def __init__(
        self,
        calibration: CalibrationPass,
        choices: Mapping[str, Choice],
        moments: Callable[[BlockId], tuple[list[InputGroup], BlockMoments]],
        work: Work,
        settings: BlockSettings,
        tick: Callable[[int], object] = lambda _n: None,
    ):
        self._calibration = calibration
        self._model = calibration.model
        self._choices = choices
        self._moments = moments
        self._work = work
        self._settings = settings
        self.tick = tick
        self._follows = (
            settings.shift or settings.epochs > 0
        )  # whether the compressed model's hidden states are computed
        self._entered: tuple[int, list[Entry]] | None = None

    def ticks(self, at: BlockId) -> int:
        """Units of progress of a block: one per layer and one per refinement step; 0 without layers."""
        layers = len(self._calibration.targets(at))
        return layers and layers + refine_steps(self._settings.epochs, len(self._calibration.batches))

    def run(self) -> None:
        """Compress all blocks that are not in the work directory yet."""
        for at in self._calibration.blocks():
            after = BlockId(at.stack, at.index + 1)
            followed = self._work.has(after.step("shifted")) or self._work.has(after.step("cores"))
            if self._work.has(at.step("cores")) and (followed or not self._follows):
                self.tick(self.ticks(at))
                continue
            self._compress(at, after)
            if at.index:  # the states after a stack's last block stay: the next stack is entered with them
                self._work.drop(at.step("shifted"))

    def _compress(self, at: BlockId, after: BlockId) -> None:
        groups, moments = self._moments(at)
        stack = self._calibration.stack(at)
        with self._model.loaded(stack, at.index) as block, self._restored(at):
            calls, inputs = self._calls(at), self._inputs(at)
            kept: dict[str, TrainableLinear] = {}
            for group, corrections in self._shifted(at, block, groups, moments, calls, inputs):
                for target in group.targets:
                    kept[target.name] = self._layer(target, moments, corrections)
                    replace_module(self._model.model, target.name, kept[target.name])
                    self.tick(1)
            record: dict[str, Any] = {name: layer.spec.to_json() for name, layer in kept.items()}
            errors = None
            if self._settings.epochs and kept:
                errors = self._refine(at, after, block, kept, moments, calls, inputs)
            if self._follows:
                with torch.no_grad():
                    states = [call(block, state) for call, state in zip(calls, inputs, strict=True)]
                self._work.save(after.step("shifted"), {f"{n}": state for n, state in enumerate(states)})
            tensors = {f"{name}|{key}": t for name, layer in kept.items() for key, t in layer.tensors().items()}
            self._work.save(at.step("cores"), tensors, {"modules": record, "refined": errors, "rows": moments.rows})

    def _shifted(
        self,
        at: BlockId,
        block: nn.Module,
        groups: list[InputGroup],
        moments: BlockMoments,
        calls: list[Call],
        inputs: list[torch.Tensor],
    ):
        """Yields, in call order, each input group with (gram, correction).

        gram: the mean of x' x'^T of its inputs in the block as compressed so far, [in, in]. correction: see
        `ShiftedMoments.correction`; None: the weights need none.
        """
        dense = self._calibration.hidden(at)
        same = all(torch.equal(a, b) for a, b in zip(dense, inputs, strict=True))
        if not self._settings.shift:
            for group in groups:
                yield group, (moments.inputs[group.targets[0].name], None)
            return
        firsts = [group.targets[0] for group in groups]
        # The dense block's inputs of every group must be recorded now: compression replaces the layers one by one.
        reads = [
            self._reads(block, firsts, call, state) for call, state in zip(self._dense_calls(at), dense, strict=True)
        ]
        for number, group in enumerate(groups):
            name = group.targets[0].name
            if moments.rows[name] == 0 or (same and number == 0):
                yield group, (moments.inputs[name], None)
                continue
            sums = ShiftedMoments(group.in_features, self._model.device)
            for call, state, read in zip(calls, inputs, reads, strict=True):
                now = self._reads(block, [group.targets[0]], call, state, stop=True)
                # A router may now send other tokens to an expert. Its rows are then not paired.
                if name in now and name in read and now[name].shape == read[name].shape:
                    sums.add(read[name], now[name])
            if sums.rows == 0:
                yield group, (moments.inputs[name], None)
                continue
            yield group, (sums.gram(), sums.correction())

    def _layer(
        self, target: Target, moments: BlockMoments, inputs: tuple[torch.Tensor, torch.Tensor | None]
    ) -> TrainableLinear:
        choice, name = self._choices[target.name], target.name
        weights, weight = self._model.weights, dense_weight(self._model, target)
        gram, correction = inputs
        gram = damped(gram)
        if correction is not None:
            weight = (weight.double() @ correction).float()
        if choice.rank is None:
            stored = dense_module(weight, choice.store, gram)
        else:
            outer = moments.outputs.get(name)
            outer = None if outer is None else damped(outer, OUTPUT_DAMPING)
            if choice.reshape is not None:
                stored = mpo_module(MpoTrain(weight, gram, outer, choice.reshape), choice.rank, choice.store)
            else:
                factors = factorize(weight, gram, outer)
                stored = factorized_module(choice.kind, weight, factors, choice.rank, choice.store, gram)
        bias = weights.tensor(f"{name}.bias") if f"{name}.bias" in weights else None
        weights.release(f"{name}.weight")
        return TrainableLinear(stored, bias).to(self._model.device)

    def _refine(
        self,
        at: BlockId,
        after: BlockId,
        block: nn.Module,
        layers: dict[str, TrainableLinear],
        moments: BlockMoments,
        calls: list[Call],
        inputs: list[torch.Tensor],
    ) -> dict[str, float]:
        wanted = self._calibration.hidden(after)
        sums = GramSum(wanted[0].shape[-1], self._model.device)
        for state in self._calibration.gradients(after) if self._settings.curvature else []:
            sums.add(state)
        metric = damped(sums.mean(), OUTPUT_DAMPING)
        parameters = [p for layer in layers.values() for p in layer.parameters()]
        for p in parameters:
            p.requires_grad_(True)
        before, best = refine_block(
            block,
            parameters,
            calls,
            inputs,
            wanted,
            metric,
            inputs_metrics=core_metrics([(layer, moments.inputs[name]) for name, layer in layers.items()]),
            epochs=self._settings.epochs,
            rate=self._settings.rate,
            seed=self._settings.seed + at.index,
            mixed=self._settings.mixed,
            tick=lambda: self.tick(1),
        )
        return {"before": before, "after": best}

    def _reads(
        self, block: nn.Module, targets: list[Target], call: Call, state: torch.Tensor, *, stop: bool = False
    ) -> dict[str, torch.Tensor]:
        """The targets' inputs in one forward pass, by name. stop: end it at the first target."""
        with torch.no_grad(), noting_inputs(targets, stop=stop) as read:
            call(block, state)
        return read

    @contextmanager
    def _restored(self, at: BlockId):
        """Puts the block's dense layers back on exit."""
        try:
            yield
        finally:
            for target in self._calibration.targets(at):
                replace_module(self._model.model, target.name, target.module)

    def _inputs(self, at: BlockId) -> list[torch.Tensor]:
        """The hidden states before the block, per batch: the compressed model's if followed, else the dense model's."""
        if not self._follows:
            return self._calibration.hidden(at)
        if at.index == 0:
            return [entry.hidden for entry in self._entries(at.stack)]
        tensors, _ = self._work.load(at.step("shifted"))
        return [tensors[f"{n}"].to(self._model.device) for n in range(len(self._calibration.batches))]

    def _calls(self, at: BlockId) -> list[Call]:
        return [entry.calls[at.index] for entry in self._entries(at.stack)]

    def _dense_calls(self, at: BlockId) -> list[Call]:
        return [entry.calls[at.index] for entry in self._calibration.entries(at.stack)]

    def _entries(self, s: int) -> list[Entry]:
        """The entries of stack s, behind compressed stacks if the compressed model is followed."""
        if not self._follows or s == 0:
            return self._calibration.entries(s)
        if self._entered is None or self._entered[0] != s:
            lasts = [BlockId(k, len(stack)) for k, stack in enumerate(self._model.stacks[:s])]
            finals = [self._work.load(last.step("shifted"))[0] for last in lasts]
            with torch.no_grad():
                self._entered = (
                    s,
                    [
                        self._model.enter(s, batch, [final[f"{n}"].to(self._model.device) for final in finals])
                        for n, batch in enumerate(self._calibration.batches)
                    ],
                )
        return self._entered[1]


def dense_weight(model: BlockModel, target: Target) -> torch.Tensor:
    """A layer's weight, [out, in], on the model's device. Raises UnsupportedModelError when its shape differs from that of
    the layer in transformers' model."""
    weight = model.weights.tensor(f"{target.name}.weight").to(model.device)
    if tuple(weight.shape) != (target.module.out_features, target.module.in_features):
        raise UnsupportedModelError(
            f"{target.name} is {list(weight.shape)} on disk, "
            f"{[target.module.out_features, target.module.in_features]} in transformers' model"
        )
    return weight


def load_block(work: Work, at: BlockId) -> tuple[dict[str, TrainableLinear], Any]:
    """A compressed block's layers by name, and the record of its step."""
    tensors, record = work.load(at.step("cores"))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.partition("|")
        parts.setdefault(name, {})[leaf] = tensor
    layers = {
        name: TrainableLinear.restore(ModuleSpec.from_json(name, entry), parts[name])
        for name, entry in record["modules"].items()
    }
    return layers, record
