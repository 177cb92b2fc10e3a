"""Checks a source against its config.json before any work: transformers initializes missing parameters at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cai_runtime.compressor.stats.weights import DenseWeights
from cai_runtime.errors import TensorDtypeError, TensorMissingError, TensorShapeError
from cai_runtime.slim.reader import read_json
from cai_runtime.slim.spec import FLOAT_STORE_OF_DTYPE
from cai_runtime.slim.writer import COPIED_FILES
from cai_runtime.stock.guard import quiet_transformers
from cai_runtime.stock.load import dense_config


def require_whole(weights: DenseWeights, skeleton: nn.Module) -> None:
    """Check name, shape and dtype of every parameter against the checkpoint, and parse the JSON files that are copied into
    the result. Reads no weights.

    skeleton: transformers' model of the checkpoint's config.json, on the meta device.

    Raises TensorMissingError, TensorShapeError or TensorDtypeError, which name the tensor and its file; InvalidConfigError
    or MissingFileError for a JSON file.
    """
    for name in COPIED_FILES:
        if name.endswith(".json") and (weights.path / name).is_file():
            read_json(weights.path / name)
    expected = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    for name, shape in expected.items():
        if name in weights:
            _check(weights, name, shape)
    missing = [name for name in expected if name not in weights]
    if not missing:
        return
    # They may be missing, or transformers may rename tensors while loading. A load of placeholders tells which.
    found, mismatched = _loaded_by_name(weights, type(skeleton))
    for name, stored, wanted in mismatched:
        raise _shape_error(weights, name, tuple(stored), tuple(wanted))
    missing = [name for name in missing if name in found]
    if missing:
        others = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
        raise TensorMissingError(
            f"the checkpoint does not have this tensor{others}, which the model of its config.json has: fetch it again, or "
            "correct config.json",
            file=weights.path,
            tensor=missing[0],
        )


def _check(weights: DenseWeights, name: str, shape: tuple[int, ...]) -> None:
    if weights.shape(name) != shape:
        raise _shape_error(weights, name, weights.shape(name), shape)
    info = weights.info(name)
    if info is not None and info.dtype not in FLOAT_STORE_OF_DTYPE:
        raise TensorDtypeError(
            f"must be {', '.join(FLOAT_STORE_OF_DTYPE)}, is {info.dtype}: start from the model's unquantized weights",
            file=info.file,
            tensor=name,
        )


def _shape_error(weights: DenseWeights, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> Exception:
    info = weights.info(name)
    return TensorShapeError(
        f"is {list(stored)}, but config.json says {list(wanted)}: one of them is another model's",
        file=info.file if info is not None else weights.path,
        tensor=name,
    )


def _loaded_by_name(weights: DenseWeights, architecture: Any) -> tuple[set[str], list[Any]]:
    """Loads placeholders through transformers, which converts names. Returns the names of missing parameters, and (name,
    stored shape, wanted shape) of those whose shapes differ."""
    # An expanded tensor has a shape but takes the memory of one number.
    names = {weights.on_disk(name): torch.zeros(()).expand(weights.shape(name)) for name in weights.names()}
    with weights.transformers_reads(), quiet_transformers():
        _, found = architecture.from_pretrained(
            None,
            config=dense_config(weights.path),
            state_dict=names,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return set(found["missing_keys"]), sorted(found["mismatched_keys"])
