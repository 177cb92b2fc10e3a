"""Writes the compressed blocks and all other tensors into a checkpoint, and counts them in its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set

import torch
from tqdm import tqdm

from cai_runtime.compressor.factor.allocate import Curve
from cai_runtime.compressor.factor.embedding_head import Ends
from cai_runtime.compressor.report import ModuleReport, Report
from cai_runtime.compressor.stats.calibrate import CalibrationPass
from cai_runtime.compressor.train.blockwise import load_block
from cai_runtime.compressor.train.heal import STEP as HEAL
from cai_runtime.compressor.work import Work
from cai_runtime.convert.cache import tqdm_disable
from cai_runtime.slim.spec import DENSE_REFERENCE_BYTES, ModuleSpec
from cai_runtime.slim.writer import CheckpointWriter


def write_checkpoint(
    writer: CheckpointWriter,
    calibration: CalibrationPass,
    ends: Ends,
    work: Work,
    curves: Mapping[str, Curve],
    report: Report,
    progress: bool | None,
) -> None:
    """Write all tensors: compressed layers as cores, embedding and head in their stores, the rest unchanged or healed. Fills
    in the report's modules and counts. One block is in memory at a time."""
    weights = calibration.model.weights
    healed = healed_parameters(work)
    done: set[str] = set()
    for at in tqdm(calibration.blocks(), desc="write", unit="block", disable=tqdm_disable(progress)):
        layers, record = load_block(work, at)
        for name, layer in layers.items():
            with torch.no_grad():
                for key, parameter in layer.named_parameters():
                    if f"{name}.{key}" in healed:
                        parameter.copy_(healed[f"{name}.{key}"])
            stored = layer.stored()
            bias = None
            if layer.bias is not None:
                bias = layer.bias.detach().to(weights.tensor(f"{name}.bias").dtype)
            writer.add_module(weights.module_on_disk(name), stored.spec, stored.cores, pivot=stored.pivot, bias=bias)
            report.modules.append(module_report(name, stored.spec, curves[name], record["rows"][name] > 0))
            report.add(stored.spec.dense_parameters, stored.spec.parameters, stored.spec.nbytes)
            done |= {f"{name}.weight", f"{name}.bias"}
            if bias is not None:
                report.add_rest(bias.numel(), bias.nbytes)
        if record["refined"] is not None:
            name = calibration.stack(at).block_name(at.index)
            report.blocks.append({"name": name, **record["refined"]})
    write_rest(writer, calibration, done, healed, ends, report)


def write_rest(
    writer: CheckpointWriter,
    calibration: CalibrationPass,
    done: Set[str],
    healed: Mapping[str, torch.Tensor],
    ends: Ends,
    report: Report,
) -> None:
    """Write every tensor that is not in `done`: embedding and head in their stores, the rest unchanged or from `healed`.
    Adds to the report's counts."""
    weights = calibration.model.weights
    for name in weights.names():
        if name in done:
            continue
        tensor = weights.tensor(name)
        nbytes = tensor.nbytes
        module = name.removesuffix(".weight")
        store = ends.stores.get(module)
        if store is not None:
            rows, width = tensor.shape
            spec = ModuleSpec("dense", rows, width, None, (store,))
            writer.add_module(weights.module_on_disk(module), spec, [ends.core(module, tensor, store)])
            nbytes = spec.nbytes
        elif name in healed:
            writer.add_tensor(weights.on_disk(name), healed[name].to(tensor.dtype))
        else:
            writer.add_tensor(weights.on_disk(name), tensor)
        weights.release(name)
        report.add_rest(math.prod(tensor.shape), nbytes)


def healed_parameters(work: Work) -> dict[str, torch.Tensor]:
    """The parameters trained by healing, by name; empty without healing."""
    if not work.has(HEAL):
        return {}
    tensors, _ = work.load(HEAL)
    return {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("p|")}


def module_report(name: str, spec: ModuleSpec, curve: Curve, calibrated: bool) -> ModuleReport:
    """The report of one module. curve: its errors by rank. calibrated: whether it had inputs in the calibration."""
    whole = curve.errors[0]
    at = max(spec.rank, default=1) if isinstance(spec.rank, tuple) else spec.rank
    mpo = spec.kind == "mpo"
    return ModuleReport(
        name=name,
        kind=spec.kind,
        rank=list(spec.rank) if isinstance(spec.rank, tuple) else spec.rank,
        store=list(spec.store),
        out_features=spec.out_features,
        in_features=spec.in_features,
        parameters=spec.parameters,
        nbytes=spec.nbytes,
        dense_bytes=spec.dense_parameters * DENSE_REFERENCE_BYTES,
        relative_error=0.0 if at is None or whole <= 0 else curve.errors[at] / whole,
        calibrated=calibrated,
        out_dims=list(spec.out_dims) if mpo else None,
        in_dims=list(spec.in_dims) if mpo else None,
    )
