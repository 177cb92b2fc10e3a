"""Loads a checkpoint, dense or slim, as transformers' own model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cai_runtime.errors import TensorMissingError, UnsupportedModelError
from cai_runtime.stock.guard import as_compression_error, quiet_transformers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPEECH = {"whisper"}  # model types that load as speech recognizers


def dense_reference(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Load a dense checkpoint as stock transformers' model, in evaluation mode with frozen parameters.

    Raises:
        CompressionError: transformers can't load it.
        TensorMissingError: a tensor is missing, which transformers would draw at random.
        UnsupportedModelError: as `auto_class`.
    """
    from transformers import AutoConfig

    with _loading(path):
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model, found = auto_class(config).from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    _require_all(path, found)
    return _frozen(model, device)


def slim_as_transformers(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", keep: float | None = None
) -> Any:
    """Load a slim checkpoint as stock transformers' model, with every module multiplied out to its dense matrix.

    For judging a slim model's quality; it takes the dense model's memory. keep: the keep at which to open an elastic
    checkpoint; None: its largest.

    Raises:
        CheckpointError: the checkpoint can't be read, or a tensor is missing.
        CompressionError: transformers can't build the model.
    """
    from transformers import GenerationConfig

    from cai_runtime.slim.reader import Checkpoint

    with Checkpoint.open(path, keep=keep) as checkpoint:
        owned = {tensor for name in checkpoint.modules for tensor in checkpoint.module_tensors(name)}
        state = {
            name: (tensor.to(dtype) if (tensor := checkpoint.tensor(name)).is_floating_point() else tensor).clone()
            for name in checkpoint.tensors()
            if name not in owned
        }
        for name in checkpoint.modules:
            module = checkpoint.module(name)
            state[f"{name}.weight"] = module.dense(torch.float32).to(dtype)
            if module.bias is not None:
                state[f"{name}.bias"] = module.bias.to(dtype)
    with _loading(path):
        config = dense_config(path)
        with torch.device("meta"):  # to find the class without allocating weights
            architecture = type(auto_class(config).from_config(config))
        model, found = architecture.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        if (Path(path) / "generation_config.json").exists():  # without a path transformers uses its defaults
            model.generation_config = GenerationConfig.from_pretrained(path)
    _require_all(path, found)
    return _frozen(model, device)


def dense_config(path: str | Path) -> Any:
    """transformers' config of a checkpoint, without its `quantization_config`. Raises what transformers raises."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def auto_class(config: Any) -> Any:
    """transformers' Auto class for this config: speech recognizer (`SPEECH`), causal language model, or image-text-to-text.

    Raises UnsupportedModelError if none of them knows the config.
    """
    import transformers

    if config.model_type in SPEECH:
        return transformers.AutoModelForSpeechSeq2Seq
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    names = ", ".join(getattr(config, "architectures", None) or []) or "no architecture"
    raise UnsupportedModelError(
        f"transformers {transformers.__version__} has no model that predicts text for model_type {config.model_type!r} "
        f"({names}). Of a larger model, save the language model as a checkpoint of its own, and take that"
    )


def _frozen(model: Any, device: str) -> Any:
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def _loading(path: str | Path) -> Iterator[None]:
    with as_compression_error(f"transformers can't load {path} as a language or speech model"), quiet_transformers():
        yield


def _require_all(path: str | Path, found: dict[str, Any]) -> None:
    """found: transformers' loading info."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise TensorMissingError(
            f"the checkpoint does not have {len(missing)} of the tensors that its config.json's model has, such as this one",
            file=path,
            tensor=missing[0],
        )
