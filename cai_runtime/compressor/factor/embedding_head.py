"""Embedding and head ("ends"): their names, their rounding, and the error of their rounding.

The ends stay dense. In a small model they are a large part of the bytes, so under a budget in bytes their stores compete
with the layers. At 4 bits the head is rounded with error feedback on its inputs (see `rounding`), also where it is tied to
the embedding. For SmolLM2-135M, which ties them, this cuts the loss added by int4-g64 from 0.14 to 0.06 nats; nearly all of
it comes through the logits.

The error of an end estimates the loss, as the errors of layers do (see `decompose`). It is the mean over positions of
(g . d)^2, with g the loss gradient and d the change by rounding. It is summed over two places: the input of the first block
of the last stack, and the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from cai_runtime.compressor.factor.curves import Noise
from cai_runtime.compressor.factor.rounding import round_with_feedback
from cai_runtime.compressor.stats.calibrate import BlockId, CalibrationPass
from cai_runtime.compressor.stats.moments import GramSum
from cai_runtime.compressor.stats.weights import DenseWeights
from cai_runtime.compressor.work import Work
from cai_runtime.slim.spec import STORES
from cai_runtime.slim.stores import CoreData, quantize

STEP = "ends"


@dataclass(frozen=True)
class Ends:
    """Embedding and head of one model.

    names: their module names in the checkpoint; one name where they are tied. heads: the names whose matrix the head
    multiplies with. gram: mean of x x^T of the head's inputs, [hidden, hidden]; None where no store needs it. noise: error
    that rounding adds, by name and store; empty unless stores compete. stores: the chosen store by name.
    """

    names: tuple[str, ...]
    heads: tuple[str, ...]
    gram: torch.Tensor | None = None
    noise: Noise = field(default_factory=dict)
    stores: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, weights: DenseWeights) -> Ends:
        """The ends of transformers' `model` that `weights` has, without gram, noise and stores."""
        head = model.get_output_embeddings()
        modules = {id(m) for m in (model.get_input_embeddings(), head) if m is not None}
        # A module may have several names in the model. The checkpoint's name counts.
        named = dict(model.named_modules(remove_duplicate=False))
        names = [name for name, m in named.items() if id(m) in modules and f"{name}.weight" in weights]
        heads = [name for name in names if head is not None and named[name].weight is head.weight]
        return cls(tuple(names), tuple(heads))

    def core(self, name: str, weight: torch.Tensor, store: str) -> CoreData:
        """The matrix `weight` [vocabulary, hidden] of an end, rounded to `store`."""
        if self.gram is not None and name in self.heads and STORES[store].bits == 4:
            return round_with_feedback(weight, self.gram.to(weight.device), store)
        return quantize(weight.float(), store)

    def round_weights(self, model: Any) -> None:
        """Round the ends of transformers' model in place to the values of their stores."""
        done: set[int] = set()
        for name, store in self.stores.items():
            parameter = model.get_submodule(name).weight
            if id(parameter) not in done:
                parameter.data = self.core(name, parameter.data, store).values().to(parameter)
            done.add(id(parameter))


def find_ends(calibration: CalibrationPass, stores: Sequence[str], work: Work, *, compete: bool) -> Ends:
    """The ends of the calibrated model, with the Gram matrix that rounding needs.

    stores: the stores they may get. compete: also measure the error of rounding to each, see `rounding_noise`. The step
    "ends" in the work directory holds both.
    """
    model = calibration.model
    ends = Ends.of(model.model, model.weights)
    if not work.has(STEP):
        feedback = ends.heads and any(STORES[store].bits == 4 for store in stores)
        found = replace(ends, gram=head_gram(calibration) if feedback else None)
        noise = rounding_noise(calibration, found, stores) if compete else {}
        work.save(STEP, {} if found.gram is None else {"gram": found.gram}, noise)
    tensors, noise = work.load(STEP)
    return replace(ends, gram=tensors.get("gram"), noise=noise)


def head_gram(calibration: CalibrationPass) -> torch.Tensor:
    """The mean of x x^T of the head's inputs on the calibration text, [hidden, hidden] fp64."""
    head = calibration.model.model.get_output_embeddings()
    total = GramSum(head.in_features, calibration.model.device)
    handle = head.register_forward_pre_hook(lambda _module, args: total.add(args[0]))
    try:
        with torch.no_grad():
            for number in range(len(calibration.batches)):
                calibration.finish(number)
    finally:
        handle.remove()
    return total.mean()


def rounding_noise(calibration: CalibrationPass, ends: Ends, stores: Sequence[str]) -> Noise:
    """The error that rounding adds, by end and store. Needs the gradients of `CalibrationPass.backward`."""
    model = calibration.model
    last = BlockId(len(model.stacks) - 1, 0)
    gradients, entries = calibration.gradients(last), calibration.entries(last.stack)
    found: Noise = {}
    for name, store in product(ends.names, stores):
        parameter = model.model.get_submodule(name).weight
        rounded = ends.core(name, parameter.data, store).values().to(parameter)
        total, rows = 0.0, 0
        for number, (gradient, entry) in enumerate(zip(gradients, entries, strict=True)):
            logits, at_logits = calibration.logits(number)
            with _holding(parameter, rounded), torch.no_grad():
                entered = calibration.enter(last.stack, number)
                changed = calibration.finish(number).logits.float()
            first = ((entered.hidden - entry.hidden) * gradient).float().sum(-1)
            second = changed.sub_(logits).mul_(at_logits).sum(-1)
            total += float(first.square().sum() + second.square().sum())
            rows += first.numel()
        found.setdefault(name, {})[store] = total / max(rows, 1)
    return found


@contextmanager
def _holding(parameter: nn.Parameter, values: torch.Tensor) -> Iterator[None]:
    before = parameter.data
    parameter.data = values
    try:
        yield
    finally:
        parameter.data = before
