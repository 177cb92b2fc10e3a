"""What every layer would lose at each rank, and by rounding: what `choices` chooses by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cai_runtime.compressor.factor.allocate import Curve
from cai_runtime.compressor.factor.choice import Choice
from cai_runtime.compressor.factor.cores import dense_module
from cai_runtime.compressor.factor.decompose import OUTPUT_DAMPING, damped, spectrum, whitened_error
from cai_runtime.compressor.factor.mpo import MpoTrain, Reshape, best_train
from cai_runtime.compressor.options import Options
from cai_runtime.compressor.stats.moments import BlockMoments
from cai_runtime.compressor.stats.targets import Target
from cai_runtime.compressor.stats.weights import DenseWeights

TYPICAL_SHARE = 0.5  # of its parameters that a layer has under a budget in bytes; by this its reshape is chosen

Noise = dict[str, dict[str, float]]  # by layer and store


def measure(
    weights: DenseWeights,
    targets: Sequence[Target],
    moments: BlockMoments,
    options: Options,
    planned: Mapping[str, Choice] | None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Of one block's layers: what each rank removes from the error, [ranks] fp64 by name; and as JSON, by name, the
    "reshapes" of matrix product operators and, under a budget in bytes, the "noise" that rounding the dense weight to each
    of the competing stores adds. planned: what a plan file says."""
    energies: dict[str, torch.Tensor] = {}
    reshapes: dict[str, Any] = {}
    noise: Noise = {}

    def measure_layer(name: str) -> None:
        gram, outer = damped(moments.inputs[name]), moments.outputs.get(name)
        outer = None if outer is None else damped(outer, OUTPUT_DAMPING)
        weight = weights.tensor(f"{name}.weight").to(options.device).float()
        choice = planned[name] if planned is not None else None
        if (options.kind if choice is None else choice.kind) == "mpo":
            if choice is not None and choice.reshape is not None:
                reshape = choice.reshape
                errors = MpoTrain(weight, gram, outer, reshape).errors()
            else:
                reshape, errors = best_train(weight, gram, outer, options.keep or TYPICAL_SHARE)
            energies[name] = -torch.tensor(errors, dtype=torch.float64).diff()
            reshapes[name] = [reshape.out_dims, reshape.in_dims]
        else:
            energies[name] = spectrum(weight, gram, outer)
        if options.target_bytes is not None:
            noise[name] = {
                store: whitened_error(dense_module(weight, store, gram).dense() - weight, gram, outer)
                for store in options.stores
            }

    for target in targets:
        measure_layer(target.name)
    return energies, {"reshapes": reshapes, "noise": noise}


def curves_of(
    targets: Sequence[Target], energies: Mapping[str, torch.Tensor], record: Mapping[str, Any], options: Options
) -> tuple[dict[str, Curve], Noise]:
    """The layers' curves and the noise in the same unit, from what `measure` gave."""
    curves: dict[str, Curve] = {}
    noise: Noise = {}
    for target in targets:
        name, module = target.name, target.module
        errors = [*energies[name].flip(0).cumsum(0).flip(0).tolist(), 0.0]
        # With curvature the errors are estimates of the loss and add up as they are; without, each layer's own outputs
        # are the only measure there is.
        unit = 1.0 if options.curvature else max(errors[0], torch.finfo(torch.float32).tiny)
        dims = record["reshapes"].get(name)
        reshape = Reshape(tuple(dims[0]), tuple(dims[1])) if dims else None
        curves[name] = Curve(
            name, module.out_features, module.in_features, [error / unit for error in errors], reshape=reshape
        )
        noise[name] = {store: error / unit for store, error in record["noise"].get(name, {}).items()}
    return curves, noise
