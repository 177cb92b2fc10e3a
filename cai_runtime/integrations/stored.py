"""A module that holds the tensors of one slim module under their names in the checkpoint, in their stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from cai_runtime.errors import InvalidPivotError, KernelError, TensorDtypeError
from cai_runtime.integrations.guarded import REFUSAL, SlimWeight, StoredWeight, stored_weight
from cai_runtime.slim.module import ModuleWeights
from cai_runtime.slim.shard import DTYPES
from cai_runtime.slim.spec import STORES, ModuleSpec
from cai_runtime.slim.stores import CoreData, as_matrix, from_matrix


class StoredModule(nn.Module):
    """Base of `SlimLinear` and `SlimEmbedding`. `weight` is the dense weight, see `guarded.SlimWeight`.

    Cores are parameters, so that accelerate offloads them; a float core in another dtype than `compute_dtype` is a buffer,
    as scales, zero points and the pivot are, because transformers takes a model's dtype to be its first float parameter's.
    Names, dtypes and shapes are those of the checkpoint, and stay so: `.to(dtype)` changes `compute_dtype` alone.

    Attributes:
        spec: of the checkpoint.
        compute_dtype: of activations; cores keep their store whatever it is.
    """

    spec: ModuleSpec
    compute_dtype: torch.dtype

    def _hold(self, spec: ModuleSpec, dtype: torch.dtype) -> None:
        """Make the tensors, on the meta device."""
        self.spec, self.compute_dtype = spec, dtype
        names = set(spec.core_names)
        for name, (stored, shape) in spec.tensors("").items():
            tensor = torch.empty(shape, dtype=getattr(torch, DTYPES[stored][0]), device="meta")
            name = name.removeprefix(".")
            if name in names and (not tensor.is_floating_point() or tensor.dtype == dtype):
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def stored_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name below the module's, tensor) of cores, scales, zero points and pivot, as on disk."""
        for name in self.spec.tensors(""):
            yield name.removeprefix("."), self._tensor(name.removeprefix("."))

    def _tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor | None = self._parameters.get(name)
        tensor = self._buffers.get(name) if tensor is None else tensor
        if tensor is None:
            raise KernelError(f"the module has lost its {name}")
        return tensor

    def module_weights(self) -> ModuleWeights:
        """The tensors as the checkpoint's reader gives them; nothing is copied."""
        # Plain tensors: kernels know no `StoredWeight`.
        held = {name: t.detach() if isinstance(t, StoredWeight) else t for name, t in self.stored_tensors()}
        cores = [
            CoreData(held[core], held.get(f"{core}_scale"), store, held.get(f"{core}_zero"), shape)
            for core, shape, store in zip(self.spec.core_names, self.spec.core_shapes, self.spec.store, strict=True)
        ]
        return ModuleWeights("", self.spec, cores, held.get("pivot"), getattr(self, "bias", None))

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight [out, in] of an embedding [rows, width], in `compute_dtype`, read-only. While the module is being
        loaded, and where its tensors are on the meta device (offloaded), the tensor of this name: codes."""
        if self.spec.kind != "dense":
            return SlimWeight.of(self.module_weights(), self.compute_dtype)
        codes: torch.Tensor | None = self._parameters.get("weight")
        codes = self._buffers.get("weight") if codes is None else codes
        if codes is None:
            raise AttributeError(f"{type(self).__name__} has no weight yet")
        if not isinstance(codes, StoredWeight) or codes.is_meta:
            return codes
        return codes.as_dense(self.module_weights(), self.compute_dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._assigned(value) if name == "weight" else value)

    def _assigned(self, value: Any) -> Any:
        """What to register where somebody assigns `weight`: a tied module's codes, or what is loaded into the module."""
        own = self._parameters.get("weight")
        if isinstance(value, SlimWeight):
            codes = value.codes
            if codes is not None and own is not None and value.is_of(self.module_weights(), value.dtype):
                return codes
        elif isinstance(value, StoredWeight) or (self.spec.kind == "dense" and not isinstance(own, StoredWeight)):
            return value
        raise KernelError(REFUSAL)

    def protect(self) -> None:
        """After loading or moving: make the packed cores `StoredWeight`s."""
        for name in self.spec.core_names:
            codes = self._parameters.get(name)
            if codes is not None and not codes.is_floating_point() and not isinstance(codes, StoredWeight):
                self._parameters[name] = stored_weight(codes)

    def dense_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W [out, in] of an embedding [rows, width], multiplied out in fp32 and rounded to `dtype` (default:
        `compute_dtype`): a new tensor at every call."""
        with torch.no_grad():
            return self.module_weights().dense(torch.float32).to(dtype or self.compute_dtype)

    def check(self, name: str) -> None:
        """After loading: whether every tensor has its store's dtype, and the pivot is a permutation (kernels write where
        it says). Nothing is asked of tensors on the meta device, which lie elsewhere.

        Raises TensorDtypeError, InvalidPivotError.
        """
        for part, (stored, _) in self.spec.tensors("").items():
            tensor = self._tensor(part.removeprefix("."))
            if tensor.dtype != getattr(torch, DTYPES[stored][0]):
                raise TensorDtypeError(
                    f"was loaded as {tensor.dtype}, but is stored as {stored}; the model keeps modules of this name in "
                    "another dtype, which slim modules can't follow",
                    tensor=name + part,
                )
        if self.spec.has_pivot and self._tensor("pivot").device.type != "meta":
            pivot = self._tensor("pivot").cpu().long()
            if not torch.equal(
                pivot.sort().values, torch.arange(self.spec.out_features, dtype=torch.int64, device="cpu")
            ):
                raise InvalidPivotError(
                    f"is not a permutation of 0..{self.spec.out_features - 1}; the file is damaged",
                    tensor=f"{name}.pivot",
                )

    def arrange(self) -> None:
        """Let each mpo core lie in memory as the matrix that the kernels take, in its own shape: they then need no copy."""
        for core, shape, store in zip(self.spec.core_names, self.spec.core_shapes, self.spec.store, strict=True):
            if len(shape) == 4 and STORES[store].bits != 4:
                tensor = self._tensor(core)
                tensor.data = from_matrix(as_matrix(tensor.data).contiguous(), shape)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StoredModule:
        """Moves devices for all, changes dtypes for what has none on disk (the bias) and for `compute_dtype`."""
        stored = {id(tensor) for _, tensor in self.stored_tensors()}

        def keep_store(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if id(tensor) not in stored or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        protected = [p for p in self._parameters.values() if isinstance(p, StoredWeight)]
        try:
            for codes in protected:
                codes.__dict__["_moving"] = True
            result = super()._apply(keep_store, recurse)
        finally:
            for codes in protected:
                codes.__dict__.pop("_moving", None)
        if protected:
            self.protect()
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device="cpu")).dtype
        return result

    def extra_repr(self) -> str:
        rank = "" if self.spec.rank is None else f", rank={self.spec.rank}"
        shape = f"{self.spec.in_features}, {self.spec.out_features}"
        return f"{shape}, kind={self.spec.kind}{rank}, store={'+'.join(self.spec.store)}, dtype={self.compute_dtype}"

    def __getstate__(self) -> dict[str, Any]:
        # What is prepared for the kernels holds addresses: a copy makes its own.
        return {**self.__dict__, "_prepared": None}
