"""The error of every layer at each rank and from rounding, the input of `choices`."""

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

TYPICAL_SHARE = 0.5  # share of its parameters at which a layer's reshape is chosen under a budget in bytes

Noise = dict[str, dict[str, float]]  # error that rounding adds, by layer and store


def measure(
    weights: DenseWeights,
    targets: Sequence[Target],
    moments: BlockMoments,
    options: Options,
    planned: Mapping[str, Choice] | None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Measures one block's layers. Returns tensors and a JSON record for `curves_of`.

    Tensors: the error that each rank removes, [ranks] fp64, by layer. Record: "reshapes", the sites of MPO layers; "noise",
    under a budget in bytes, the error that rounding the dense weight to each competing store adds. Both by layer.

    planned: choices of a plan file, by layer; None: no plan file.
    """
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
    """Curves and noise by layer, in the same unit, from the results of `measure`."""
    curves: dict[str, Curve] = {}
    noise: Noise = {}
    for target in targets:
        name, module = target.name, target.module
        errors = [*energies[name].flip(0).cumsum(0).flip(0).tolist(), 0.0]
        # With curvature, errors estimate the loss and add up over layers. Without it, errors are relative to each layer's
        # own outputs.
        unit = 1.0 if options.curvature else max(errors[0], torch.finfo(torch.float32).tiny)
        dims = record["reshapes"].get(name)
        reshape = Reshape(tuple(dims[0]), tuple(dims[1])) if dims else None
        curves[name] = Curve(
            name, module.out_features, module.in_features, [error / unit for error in errors], reshape=reshape
        )
        noise[name] = {store: error / unit for store, error in record["noise"].get(name, {}).items()}
    return curves, noise
