"""The dense weights of a source, tensor by tensor. The cores of a slim source are multiplied out."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cai_runtime.convert.cache import sha256_of
from cai_runtime.integrations.names import Names
from cai_runtime.progress import progress_bar
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.shard import TensorInfo
from cai_runtime.stock.guard import as_compression_error
from cai_runtime.stock.load import SPEECH, auto_class, dense_config, dense_reference, slim_as_transformers
from cai_runtime.stock.torch_state import parameters_on_meta


class DenseWeights:
    """The tensors of transformers' model by name, read from an open checkpoint.

    Names are the checkpoint's until `skeleton` is called, then the model's. A tensor that transformers fuses or permutes
    while loading has no name in the model. It keeps the checkpoint's name: `tensor` reads it, but `in` is False.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self.path: Path = checkpoint.path
        self._on_disk: dict[str, str] = {}  # name in the model -> name in the checkpoint, where they differ
        self._converted: set[str] = set()  # names in the checkpoint that have none in the model
        self._tied: dict[str, str] = {}  # tensor that the checkpoint lacks -> tensor that it is tied to
        self._read: dict[str, str] = {}  # name in the model -> name to read, where it differs from the name to write
        self._same: set[str] = set()  # tied tensors that count as the tensor they are tied to
        self._config = checkpoint.config

    @property
    def model_type(self) -> str:
        return str(self._checkpoint.config.get("model_type", ""))

    @property
    def is_speech(self) -> bool:
        return self.model_type in SPEECH

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or name in self._converted or name in self._same:
            return False
        return self._module_of(name) is not None or self._place(name) in self._checkpoint

    def on_disk(self, name: str) -> str:
        """The name of a tensor of the model in the source checkpoint and in the slim checkpoint."""
        return self._on_disk.get(name, name)

    def _place(self, name: str) -> str:
        """The name under which to read a tensor of the model from the checkpoint."""
        return self._read.get(name, self.on_disk(name))

    def module_on_disk(self, module: str) -> str:
        """`on_disk` for a module with a weight."""
        return self.on_disk(f"{module}.weight").removesuffix(".weight")

    def names(self) -> list[str]:
        """The names of all tensors, in the checkpoint's order. The cores of a module count as its weight."""
        names = {disk: name for name, disk in (self._on_disk | self._read).items()}
        found = (names.get(disk, disk) for disk in self._names_on_disk())
        return [name for name in found if name not in self._same]

    def _names_on_disk(self) -> list[str]:
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
        return tuple(self._checkpoint.tensors()[self._place(name)].shape)

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor as stored; of a slim module the bytes of its cores."""
        module = self._module_of(name)
        if module is not None:
            return self._checkpoint.modules[module].nbytes
        return self._checkpoint.tensors()[self._place(name)].nbytes

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, read-only; the weight of a slim module in fp32. Resolves tied tensors."""
        name = self._tied.get(name, name)
        module = self._module_of(name)
        if module is not None:
            return self._checkpoint.module(module).dense()
        return self._checkpoint.tensor(self._place(name))

    def release(self, name: str) -> None:
        """Release the memory pages of the tensor's file mapping."""
        name = self._tied.get(name, name)
        module = self._module_of(name)
        self._checkpoint.release(self._checkpoint.module_tensors(module) if module is not None else self._place(name))

    def bias_owner(self, name: str) -> bool:
        """Whether the tensor is the bias of a layer whose weight is in these weights."""
        return name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in self

    def hashes(self, progress: bool | None = None) -> dict[str, str]:
        """SHA-256 of every tensor file, by file name. progress: see `progress_bar`."""
        files = sorted({info.file for info in self._checkpoint.tensors().values()})
        size = sum(file.stat().st_size for file in files)
        with progress_bar("hash source", total=size, unit="B", show=progress, unit_scale=True) as bar:
            return {file.name: sha256_of(file, bar.update) for file in files}

    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json. After `skeleton`, without ties that the tensors contradict."""
        return self._config

    def parameters(self) -> int:
        """Number of parameters of the dense model."""
        return sum(math.prod(self.shape(name)) for name in self.names())

    def info(self, name: str) -> TensorInfo | None:
        """File, dtype and shape of the tensor; None for a slim module's weight or a missing tensor."""
        return None if self._module_of(name) is not None else self._checkpoint.tensors().get(self._place(name))

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        """transformers' model with parameters on the meta device and real buffers. From now on names are the model's.

        Raises CompressionError when transformers can't build it, UnsupportedModelError as `auto_class`.
        """
        model = self._named_skeleton(dtype, tie=True)
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        both = [(name, kept) for name, kept in tied.items() if name in self and kept in self]
        if any(not self._equal(name, kept) for name, kept in both):
            # transformers does not tie tensors that differ, whatever config.json says. The slim checkpoint must not, either.
            self._config = _without_ties(self._checkpoint.config)
            return self._named_skeleton(dtype, tie=False)
        for name, kept in tied.items():
            if name in self and kept not in self:
                self._read[kept] = self._place(name)  # the checkpoint has the head alone: read the embedding from it
        self._same = {name for name in tied if name in self}
        self._tied = {name: kept for name, kept in tied.items() if kept in self}
        return model

    def _named_skeleton(self, dtype: torch.dtype, *, tie: bool) -> nn.Module:
        """The skeleton. Sets the mapping of its names to names in the checkpoint."""
        self._read, self._same, self._tied = {}, set(), {}
        with self.transformers_reads(), parameters_on_meta():
            config = dense_config(self.path)
            for part in () if tie else (config, getattr(config, "text_config", config)):
                part.tie_word_embeddings = False
            model: nn.Module = auto_class(config).from_config(config, dtype=dtype)
        names = Names(model)
        found = {disk: names.in_model(disk) for disk in sorted(self._names_on_disk())}
        self._on_disk = {name: disk for disk, name in found.items() if name is not None and name != disk}
        self._converted = {disk for disk, name in found.items() if name is None}
        return model

    def _equal(self, one: str, other: str) -> bool:
        a, b = self.tensor(one), self.tensor(other)
        return a.dtype == b.dtype and torch.equal(a, b)

    def resident(self, dtype: torch.dtype) -> nn.Module:
        """transformers' model with all its weights in `dtype`, on the CPU."""
        load = slim_as_transformers if self._checkpoint.is_slim else dense_reference
        return load(self.path, dtype=dtype)

    def transformers_reads(self) -> AbstractContextManager[None]:
        """A context that turns transformers' errors into CompressionError."""
        return as_compression_error(f"transformers can't build the model of {self.path}")

    def _module_of(self, name: str) -> str | None:
        name = self._place(name)
        module = name.removesuffix(".weight")
        return module if module != name and module in self._checkpoint.modules else None


def _without_ties(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with untied embedding and head."""
    found = config | {"tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        found["text_config"] = text | {"tie_word_embeddings": False}
    return found
