"""Embedding and head: which matrices they are, and what rounding them costs.

They stay dense, and of a small model they are a large part: which store each has competes with what its bytes would do for
the layers. Layers' errors are estimates of the loss by the gradients of the calibration text (see `decompose`), and so is
this one: the mean over the positions of (g . d)^2, g the loss gradient and d what rounding changes, once for what the first
block is given and once for the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cai_runtime.compress.calibrate import BlockId, CalibrationPass
from cai_runtime.compress.curves import Noise
from cai_runtime.compress.weights import DenseWeights

STEP = "ends"


def end_names(model: Any, weights: DenseWeights) -> list[str]:
    """Embedding and head as the checkpoint has them: one name where they share a matrix, and none that it does not have."""
    modules = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    # A module that the model has under several names is what the checkpoint calls it.
    named = model.named_modules(remove_duplicate=False)
    return [name for name, module in named if id(module) in modules and f"{name}.weight" in weights]


def round_ends(model: Any, stores: dict[str, str], weights: DenseWeights) -> None:
    """Give embedding and head of transformers' model the values that they have once they are stored so, by name."""
    done: set[int] = set()
    for name, store in stores.items():
        parameter = model.get_submodule(name).weight
        if id(parameter) not in done:
            parameter.data = weights.rounded(parameter.data, store)
        done.add(id(parameter))


def ends_noise(calibration: CalibrationPass, stores: Sequence[str]) -> Noise:
    """What rounding each of embedding and head to each store adds to the error, after `CalibrationPass.backward`."""
    model = calibration.model
    last = BlockId(len(model.stacks) - 1, 0)
    found: Noise = {name: dict.fromkeys(stores, 0.0) for name in end_names(model.model, model.weights)}
    gradients, entries, rows = calibration.gradients(last), calibration.entries(last.stack), 0
    for number, (gradient, entry) in enumerate(zip(gradients, entries, strict=True)):
        logits, at_logits = calibration.logits(number)
        rows += gradient[..., 0].numel()
        for name, errors in found.items():
            for store in stores:
                with _rounded(model.model.get_submodule(name).weight, store, model.weights), torch.no_grad():
                    entered = calibration.enter(last.stack, number)
                    changed = calibration.finish(number).logits.float()
                first = ((entered.hidden - entry.hidden) * gradient).float().sum(-1)
                second = changed.sub_(logits).mul_(at_logits).sum(-1)
                errors[store] += float(first.square().sum() + second.square().sum())
    return {name: {store: error / max(rows, 1) for store, error in errors.items()} for name, errors in found.items()}


@contextmanager
def _rounded(parameter: nn.Parameter, store: str, weights: DenseWeights) -> Iterator[None]:
    before = parameter.data
    parameter.data = weights.rounded(before, store)
    try:
        yield
    finally:
        parameter.data = before
