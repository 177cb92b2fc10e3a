"""The dense weights of a source, tensor by tensor: of a dense checkpoint as they lie there, of a slim one multiplied
out."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cai_runtime.compress.evaluate import SPEECH, auto_class, dense_reference, slim_as_transformers
from cai_runtime.compress.foreign import foreign
from cai_runtime.compress.torch_state import parameters_on_meta
from cai_runtime.convert.cache import sha256_of
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.shard import TensorInfo


class DenseWeights:
    """Named tensors of transformers' model, read from a checkpoint that stays open as long as this is used."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self.path: Path = checkpoint.path

    @property
    def model_type(self) -> str:
        return str(self._checkpoint.config.get("model_type", ""))

    @property
    def is_speech(self) -> bool:
        return self.model_type in SPEECH

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._module_of(name) is not None or name in self._checkpoint)

    def names(self) -> list[str]:
        """Names as the dense model has them, in the checkpoint's order; cores of a module stand under its weight's
        name."""
        found: dict[str, None] = {}
        owned = {t: m for m in self._checkpoint.modules for t in self._checkpoint.module_tensors(m)}
        for tensor in self._checkpoint.tensors():
            module = owned.get(tensor)
            bias = module is not None and tensor == f"{module}.bias"
            found[tensor if module is None or bias else f"{module}.weight"] = None
        return list(found)

    def shape(self, name: str) -> tuple[int, ...]:
        module = self._module_of(name)
        if module is not None:
            spec = self._checkpoint.modules[module]
            return spec.out_features, spec.in_features
        return tuple(self._checkpoint.tensors()[name].shape)

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor as it is stored; of a slim module, of its cores."""
        module = self._module_of(name)
        return (
            self._checkpoint.modules[module].nbytes if module is not None else self._checkpoint.tensors()[name].nbytes
        )

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in the dtype in which it is stored (a slim module's weight: fp32). Do not write to it."""
        module = self._module_of(name)
        if module is not None:
            return self._checkpoint.module(module).dense()
        return self._checkpoint.tensor(name)

    def release(self, name: str) -> None:
        """Drop its resident pages."""
        module = self._module_of(name)
        self._checkpoint.release(self._checkpoint.module_tensors(module) if module is not None else name)

    def bias_owner(self, name: str) -> bool:
        """Whether the tensor is the bias of a layer whose weight is there, too."""
        return name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in self

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file the tensors lie in, by name."""
        files = sorted({info.file for info in self._checkpoint.tensors().values()})
        return {file.name: sha256_of(file) for file in files}

    def config(self) -> dict[str, Any]:
        """config.json as it lies there."""
        return self._checkpoint.config

    def parameters(self) -> int:
        """Numbers of the dense model."""
        return sum(math.prod(self.shape(name)) for name in self.names())

    def info(self, name: str) -> TensorInfo | None:
        """Where the tensor lies; None of one that is multiplied out, or not there."""
        return None if self._module_of(name) is not None else self._checkpoint.tensors().get(name)

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        """transformers' model with parameters on the meta device and real buffers.

        Raises CompressionError when transformers can't build it.
        """
        with self.transformers_reads(), parameters_on_meta():
            return auto_class(self.model_type).from_config(self.transformers_config(), dtype=dtype)

    def resident(self, dtype: torch.dtype) -> nn.Module:
        """transformers' model with all its weights, on the CPU."""
        load = slim_as_transformers if self._checkpoint.is_slim else dense_reference
        return load(self.path, dtype=dtype)

    def transformers_reads(self) -> AbstractContextManager[None]:
        """In which transformers' errors are a CompressionError."""
        return foreign(f"transformers can't build the model of {self.path}")

    def transformers_config(self) -> Any:
        """config.json as transformers has it, as that of a dense model."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def _module_of(self, name: str) -> str | None:
        module = name.removesuffix(".weight")
        return module if module != name and module in self._checkpoint.modules else None
