"""From a checkpoint's modules to linears that run: dtype, device, backend, and no second copy of a weight."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from cai_runtime.errors import TensorShapeError
from cai_runtime.kernels.cpu_library import Arena, prefers_int8
from cai_runtime.kernels.prepare import prepare
from cai_runtime.kernels.slim_linear import PreparedLinear
from cai_runtime.kernels.weights import Core, LinearWeights
from cai_runtime.slim.spec import STORES, matrix_shape

if TYPE_CHECKING:
    from cai_runtime.slim.module import ModuleWeights
    from cai_runtime.slim.reader import Checkpoint
    from cai_runtime.slim.stores import CoreData

logger = logging.getLogger(__name__)


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """What a config.json names as the dtype of the float weights; fp32 if it names none that is known."""
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    narrow = {"float16": torch.float16, "fp16": torch.float16, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
    return narrow.get(name, torch.float32)


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
    backend: a resolved kernel backend. prefix: of the base model. transformers takes it off or puts it before a name where
    that gives a tensor of the model, and so do all methods here: a checkpoint of the base model alone lacks the prefix, one
    saved from inside a wrapper may have it twice. cache_dtype: of cached keys and values as asked for; None: as the model
    chooses. activations: see `rounds`.
    """

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype | None
    backend: str
    arena: Arena | None = field(default=None)
    activations: str = "fp32"
    cache_dtype: torch.dtype | None = None
    prefix: str = "model"

    def __post_init__(self) -> None:
        if self.backend == "cpu" and self.arena is None:
            self.arena = Arena()

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls the module or tensor `name` of the model."""
        dotted = f"{self.prefix}."
        for found in (name, name.removeprefix(dotted), dotted + name):
            if self.checkpoint.has_module(found) or found in self.checkpoint:
                return found
        return name

    def weights(self, name: str, shape: tuple[int, int], *, bias: bool = True) -> LinearWeights:
        """Module `name` as [out, in] = shape. bias: whether to take its bias along, if it has one.

        Raises TensorShapeError when the checkpoint's module is of another shape."""
        module = self._module(name)
        found = (module.spec.out_features, module.spec.in_features)
        if found != shape:
            message = f"module {module.name} is {list(found)}, but config.json asks for {list(shape)}"
            raise TensorShapeError(message, file=self.checkpoint.path, tensor=module.name)
        if not bias:
            module = replace(module, bias=None)
        weights = kernel_weights(module, dtype=self.dtype, device=self.device)
        # The CPU backend packs, that is copies; the others keep the tensors that they are given.
        return weights if self.backend == "cpu" else self._own(weights)

    def linear(
        self, names: Sequence[str], shapes: Sequence[tuple[int, int]], *, bias: bool = True, encoder: bool = False
    ) -> PreparedLinear:
        """Projections that share their input, as one prepared group. bias: as in `weights`. encoder: of an encoder."""
        members = [self.weights(n, s, bias=bias) for n, s in zip(names, shapes, strict=True)]
        group = prepare(
            members,
            backend=self.backend,
            arena=self.arena,
            int8_activations=self.rounds(encoder),
            activations=None if self.backend == "cpu" else self.activation_dtype,
        )
        del members
        for name in names:
            self.release(name)
        return group

    def rounds(self, encoder: bool = False) -> bool:
        """Whether the inputs of int8 cores are rounded to int8 (see `kernels.quantized_rows`): "int8" yes, "fp32" no, "auto"
        where the CPU's kernels are faster with it, and in encoders."""
        if self.activations != "auto":
            return self.activations == "int8"
        return encoder or (self.backend == "cpu" and prefers_int8())

    def embedding_and_head(
        self, table: str, head: str, shape: tuple[int, int], *, tied: bool
    ) -> tuple[LinearWeights, LinearWeights | None]:
        """The modules `table` and `head`, [vocabulary, hidden] = shape; the second None where they are one.

        tied: whether config.json ties them. As in transformers, they are then one if the checkpoint holds either of them, or
        two that are equal; two that differ are two. `release` both once they are copied.
        """
        if not tied:
            return self.weights(table, shape, bias=False), self.weights(head, shape, bias=False)
        has_table, has_head = (self.checkpoint.has_module(self.stored_name(name)) for name in (table, head))
        if has_table and has_head and not _same(self._module(table), self._module(head)):
            logger.warning(
                "%s: config.json ties %s to %s, but the checkpoint holds two that differ: both are used",
                self.checkpoint.path, head, table,
            )  # fmt: skip
            return self.weights(table, shape, bias=False), self.weights(head, shape, bias=False)
        return self.weights(head if has_head and not has_table else table, shape, bias=False), None

    def release(self, name: str) -> None:
        """Let go of the mapped pages of a module, if the checkpoint has it."""
        name = self.stored_name(name)
        if self.checkpoint.has_module(name):
            self.checkpoint.release(self.checkpoint.module_tensors(name))

    def _module(self, name: str) -> ModuleWeights:
        return self.checkpoint.module(self.stored_name(name))

    def vector(self, name: str, size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A norm's weight, copied, in `dtype` (default: the activations')."""
        return self.tensor(name, (size,), dtype)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor that is no linear's weight, copied, in `dtype` (default: the activations').

        Raises TensorShapeError when the checkpoint's is of another shape."""
        name = self.stored_name(name)
        stored = self.checkpoint.tensor(name)
        if tuple(stored.shape) != shape:
            message = f"tensor {name} is {list(stored.shape)}, but config.json asks for {list(shape)}"
            raise TensorShapeError(message, file=self.checkpoint.path, tensor=name)
        copied = stored.to(self.device, dtype or self.activation_dtype, copy=True)
        self.checkpoint.release(name)
        return copied

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


def _same(a: ModuleWeights, b: ModuleWeights) -> bool:
    """Whether two modules hold the same numbers in the same stores."""
    if a.spec != b.spec or (a.pivot is not None and b.pivot is not None and not torch.equal(a.pivot, b.pivot)):
        return False
    cores = [(one.tensors, other.tensors) for one, other in zip(a.cores, b.cores, strict=True)]
    pairs = [(one[part], other[part]) for one, other in cores for part in one]
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)
