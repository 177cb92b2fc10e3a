"""From a checkpoint's modules to linears that run: dtype, device, backend, and no second copy of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from cai_runtime.errors import TensorShapeError
from cai_runtime.kernels.cpu_library import Arena
from cai_runtime.kernels.slim_linear import PreparedLinear, prepare
from cai_runtime.kernels.weights import Core, LinearWeights
from cai_runtime.slim.spec import STORES, matrix_shape

if TYPE_CHECKING:
    from cai_runtime.slim.module import ModuleWeights
    from cai_runtime.slim.reader import Checkpoint
    from cai_runtime.slim.stores import CoreData


def kernel_weights(module: ModuleWeights, *, dtype: torch.dtype | None, device: torch.device) -> LinearWeights:
    """The kernels' view of a stored module. Float cores are converted to `dtype` (None: kept as stored); packed ones
    (int8, int4) stay as they are. Nothing is copied that needs no conversion."""
    spec = module.spec

    def core(stored: CoreData) -> Core:
        data, group = stored.matrix(), STORES[stored.store].group
        if data.is_floating_point() and dtype is not None:
            data = data.to(dtype)
        columns = matrix_shape(stored.shape)[1] if group else None
        return Core(data, stored.scale, stored.zero, group, columns).map(lambda tensor: tensor.to(device))

    mpo = spec.kind == "mpo"
    return LinearWeights(
        kind=spec.kind,
        in_features=spec.in_features,
        out_features=spec.out_features,
        cores=tuple(core(c) for c in module.cores),
        rank=spec.rank if isinstance(spec.rank, int) else None,
        pivot=None if module.pivot is None else module.pivot.to(device),
        bias=None if module.bias is None else module.bias.to(device, torch.float32),
        out_dims=spec.out_dims,
        in_dims=spec.in_dims,
        bonds=(1, *(c.shape[3] for c in module.cores)) if mpo else (),
    )


@dataclass
class WeightLoader:
    """Reads modules and tensors of one checkpoint in the form a model wants, and lets go of each mapped page after use.

    dtype: activations' and float weights' dtype; None keeps float weights as stored (the CPU kernels convert in registers).
    backend: a resolved kernel backend. int8_activations: the inputs of int8 cores are rounded to int8 (W8A8, see
    `kernels.quantized_rows`), in every linear that `linear` gives.
    """

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype | None
    backend: str
    arena: Arena | None = field(default=None)
    int8_activations: bool = False

    def __post_init__(self) -> None:
        if self.backend == "cpu" and self.arena is None:
            self.arena = Arena()

    def weights(self, name: str, shape: tuple[int, int]) -> LinearWeights:
        """Module `name` as [out, in] = shape. Raises TensorShapeError when the checkpoint's module is of another."""
        module = self.checkpoint.module(name)
        found = (module.spec.out_features, module.spec.in_features)
        if found != shape:
            message = f"module {name} is {list(found)}, but config.json asks for {list(shape)}"
            raise TensorShapeError(message, file=self.checkpoint.path, tensor=name)
        weights = kernel_weights(module, dtype=self.dtype, device=self.device)
        # The CPU backend packs, that is copies; the others keep the tensors that they are given.
        return weights if self.backend == "cpu" else self._own(weights)

    def linear(self, names: Sequence[str], shapes: Sequence[tuple[int, int]]) -> PreparedLinear:
        """Projections that share their input, as one prepared group."""
        members = [self.weights(n, s) for n, s in zip(names, shapes, strict=True)]
        group = prepare(members, backend=self.backend, arena=self.arena, int8_activations=self.int8_activations)
        del members
        for name in names:
            self.checkpoint.release(self.checkpoint.module_tensors(name))
        return group

    def vector(self, name: str, size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A norm's weight, copied, in `dtype` (default: the activations')."""
        stored = self.checkpoint.tensor(name)
        if tuple(stored.shape) != (size,):
            message = f"tensor {name} is {list(stored.shape)}, but config.json asks for [{size}]"
            raise TensorShapeError(message, file=self.checkpoint.path, tensor=name)
        vector = stored.to(self.device, dtype or self.activation_dtype, copy=True)
        self.checkpoint.release(name)
        return vector

    @property
    def activation_dtype(self) -> torch.dtype:
        """The CPU kernels compute in fp32; elsewhere activations have the float weights' dtype."""
        if self.backend == "cpu" or self.dtype is None:
            return torch.float32
        return self.dtype

    def _own(self, w: LinearWeights) -> LinearWeights:
        """A copy of what is still a view of the mapped file."""
        if self.device.type != "cpu":
            return w
        return replace(
            w,
            cores=tuple(c.map(torch.clone) for c in w.cores),
            pivot=None if w.pivot is None else w.pivot.clone(),
            bias=None if w.bias is None else w.bias.clone(),
        )
