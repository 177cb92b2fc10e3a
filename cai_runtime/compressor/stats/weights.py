"""The dense weights of a source, tensor by tensor: of a dense checkpoint as they lie there, of a slim one multiplied
out."""

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
    """Named tensors of transformers' model, read from a checkpoint that stays open as long as this is used.

    Names are the model's once there was a `skeleton`. A tensor that transformers fuses with others or permutes while it
    loads has none there: it keeps the checkpoint's name, by which it can be read, but is not in the weights.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self.path: Path = checkpoint.path
        self._on_disk: dict[str, str] = {}  # name in the model -> name in the checkpoint, where they differ
        self._converted: set[str] = set()
        self._tied: dict[str, str] = {}  # name of a tensor that the checkpoint lacks -> name of the one that it is, too
        self._read: dict[str, str] = {}  # name in the model -> where to read it, where it will be written elsewhere
        self._same: set[str] = set()  # tied tensors of the model that count as the one they are tied to
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
        """What a tensor of the model is called in the checkpoint, and in the one that is made of it."""
        return self._on_disk.get(name, name)

    def _place(self, name: str) -> str:
        """Where a tensor of the model lies in the checkpoint."""
        return self._read.get(name, self.on_disk(name))

    def module_on_disk(self, module: str) -> str:
        """The same for a module with a weight."""
        return self.on_disk(f"{module}.weight").removesuffix(".weight")

    def names(self) -> list[str]:
        """Of all tensors, in the checkpoint's order; cores of a module stand under its weight's name."""
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
        """Bytes of the tensor as it is stored; of a slim module, of its cores."""
        module = self._module_of(name)
        if module is not None:
            return self._checkpoint.modules[module].nbytes
        return self._checkpoint.tensors()[self._place(name)].nbytes

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in the dtype in which it is stored (a slim module's weight: fp32). Do not write to it. One that is not
        in the weights because it is tied to another is there, too."""
        name = self._tied.get(name, name)
        module = self._module_of(name)
        if module is not None:
            return self._checkpoint.module(module).dense()
        return self._checkpoint.tensor(self._place(name))

    def release(self, name: str) -> None:
        """Drop its resident pages."""
        name = self._tied.get(name, name)
        module = self._module_of(name)
        self._checkpoint.release(self._checkpoint.module_tensors(module) if module is not None else self._place(name))

    def bias_owner(self, name: str) -> bool:
        """Whether the tensor is the bias of a layer whose weight is there, too."""
        return name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in self

    def hashes(self, progress: bool | None = None) -> dict[str, str]:
        """SHA-256 of every file the tensors lie in, by name. progress: as of `progress_bar`."""
        files = sorted({info.file for info in self._checkpoint.tensors().values()})
        size = sum(file.stat().st_size for file in files)
        with progress_bar("hash source", total=size, unit="B", show=progress, unit_scale=True) as bar:
            return {file.name: sha256_of(file, bar.update) for file in files}

    def config(self) -> dict[str, Any]:
        """config.json as it lies there; once there was a `skeleton`, without ties that the tensors contradict."""
        return self._config

    def parameters(self) -> int:
        """Numbers of the dense model."""
        return sum(math.prod(self.shape(name)) for name in self.names())

    def info(self, name: str) -> TensorInfo | None:
        """Where the tensor lies; None of one that is multiplied out, or not there."""
        return None if self._module_of(name) is not None else self._checkpoint.tensors().get(self._place(name))

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        """transformers' model with parameters on the meta device and real buffers.

        Raises CompressionError when transformers can't build it, UnsupportedModelError as `auto_class`.
        """
        model = self._named_skeleton(dtype, tie=True)
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        both = [(name, kept) for name, kept in tied.items() if name in self and kept in self]
        if any(not self._equal(name, kept) for name, kept in both):
            # transformers then ties nothing, whatever config.json says, and so does what is made of it.
            self._config = _without_ties(self._checkpoint.config)
            return self._named_skeleton(dtype, tie=False)
        for name, kept in tied.items():
            if name in self and kept not in self:
                self._read[kept] = self._place(name)  # the head alone is there: it is the embedding
        self._same = {name for name in tied if name in self}
        self._tied = {name: kept for name, kept in tied.items() if kept in self}
        return model

    def _named_skeleton(self, dtype: torch.dtype, *, tie: bool) -> nn.Module:
        """The skeleton, and what its tensors are called on disk."""
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
        """transformers' model with all its weights, on the CPU."""
        load = slim_as_transformers if self._checkpoint.is_slim else dense_reference
        return load(self.path, dtype=dtype)

    def transformers_reads(self) -> AbstractContextManager[None]:
        """In which transformers' errors are a CompressionError."""
        return as_compression_error(f"transformers can't build the model of {self.path}")

    def _module_of(self, name: str) -> str | None:
        name = self._place(name)
        module = name.removesuffix(".weight")
        return module if module != name and module in self._checkpoint.modules else None


def _without_ties(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose embedding and head are two."""
    found = config | {"tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        found["text_config"] = text | {"tie_word_embeddings": False}
    return found
