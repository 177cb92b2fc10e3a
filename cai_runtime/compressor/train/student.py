"""Linear layers with trainable cores that are rounded to their stores in every forward pass.

The rounding has a straight-through gradient (Bengio, Leonard and Courville, "Estimating or propagating gradients through
stochastic neurons for conditional computation", 2013). Training thus sees the values that will be stored. Scales and zero
points stay fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from cai_runtime.compressor.factor.cores import StoredModule
from cai_runtime.slim.int4 import MAX_CODE, SYMMETRIC_ZERO, pack
from cai_runtime.slim.spec import STORES, ModuleSpec, matrix_shape
from cai_runtime.slim.stores import INT8_MAX, CoreData, as_matrix, from_matrix

EDGE = 0.49  # of a quantization step: largest initial distance of a latent from the value of its code


class TrainableCore(nn.Module):
    """One core: `latent`, its fp32 matrix [rows, columns], and the quantization grid it is rounded to.

    start: the core before rounding; None: start from the rounded values. Error feedback may have chosen a code that is not
    the nearest one. Such a number starts at the edge of its code's cell, so that it rounds to that code.
    """

    def __init__(self, core: CoreData, start: torch.Tensor | None = None):
        super().__init__()
        self.store = core.store
        self.scale = core.scale.float() if core.scale is not None else None
        self.zero = core.zero.float() if core.zero is not None else None
        self.shape = core.shape
        values = as_matrix(core.values())
        if start is None:
            latent = values
        elif self.scale is None:
            latent = as_matrix(start.float())
        else:
            reach = self._spread(self.scale) * EDGE
            latent = torch.minimum(torch.maximum(as_matrix(start.float()), values - reach), values + reach)
        self.latent = nn.Parameter(latent.clone().contiguous())

    @classmethod
    def restore(
        cls,
        store: str,
        shape: tuple[int, ...],
        latent: torch.Tensor,
        scale: torch.Tensor | None,
        zero: torch.Tensor | None,
    ) -> TrainableCore:
        """A core of this store and shape from the tensors of `TrainableLinear.tensors`."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.store, made.scale, made.zero, made.shape = store, scale, zero, shape
        made.latent = nn.Parameter(latent)
        return made

    def forward(self) -> torch.Tensor:
        """The core as it will be stored, fp32; differentiable with respect to `latent`."""
        return _Rounded.apply(self.latent, self)

    def rounded(self, latent: torch.Tensor) -> torch.Tensor:
        """`latent` rounded to the store, fp32, without a gradient."""
        kind = STORES[self.store]
        if self.scale is None:
            return latent if self.store == "fp32" else latent.to(_dtype(self.store)).float()
        scale = self._spread(self.scale)
        return self._steps(latent, scale, kind.bits).mul_(scale)

    def core_data(self) -> CoreData:
        """The core in its store, as a checkpoint holds it."""
        latent, kind = self.latent.detach(), STORES[self.store]
        if self.scale is None:
            data = from_matrix(latent, self.shape).to(_dtype(self.store), copy=True)
            return CoreData(data.contiguous(), None, self.store)
        steps = self._steps(latent, self._spread(self.scale), kind.bits)
        if kind.bits == 8:
            return CoreData(from_matrix(steps, self.shape).to(torch.int8).contiguous(), self.scale.clone(), self.store)
        codes = (steps + self._middle()).to(torch.uint8)
        zero = self.zero.to(torch.uint8) if self.zero is not None else None
        return CoreData(pack(codes), self.scale.bfloat16(), self.store, zero, self.shape)

    def _steps(self, latent: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
        """latent / scale, rounded and clamped to the range of the codes."""
        steps = (latent / scale).round_()
        if bits == 8:
            return steps.clamp_(-INT8_MAX, INT8_MAX)
        middle = self._middle()
        return steps.add_(middle).clamp_(0, MAX_CODE).sub_(middle)

    def _middle(self) -> torch.Tensor | float:
        return float(SYMMETRIC_ZERO) if self.zero is None else self._spread(self.zero)

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """Per-row values [rows] or per-group values [rows, groups], in a shape that broadcasts over the core."""
        group = STORES[self.store].group
        return x[:, None] if not group else x.repeat_interleave(group, dim=1)[:, : matrix_shape(self.shape)[1]]

    def _apply(self, fn, recurse=True):  # `to` must move scale and zero, which are neither parameters nor buffers
        self.scale = fn(self.scale) if self.scale is not None else None
        self.zero = fn(self.zero) if self.zero is not None else None
        return super()._apply(fn, recurse)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latent: torch.Tensor, core: TrainableCore) -> torch.Tensor:
        return core.rounded(latent)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        return grads[0], None


class _Permuted(torch.autograd.Function):
    """Permutes the last dimension. Plain indexing has a scatter-add as its gradient, which a permutation does not need; on
    the CPU it also takes eight times as long as gather."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.back = back
        return x.gather(-1, order.expand_as(x))

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        return grads[0].gather(-1, ctx.back.expand_as(grads[0])), None, None


class TrainableLinear(nn.Module):
    """A trainable module of any kind in place of a torch.nn.Linear: y = W x + bias for x [..., in].

    The cores compute in the dtype of x. bias: [out], held in fp32; None: none.
    """

    cores: nn.ModuleList
    bias: nn.Parameter | None

    def __init__(self, module: StoredModule, bias: torch.Tensor | None = None):
        super().__init__()
        self.spec: ModuleSpec = module.spec
        starts: list[torch.Tensor | None] = list(module.floats) if module.floats else [None] * len(module.cores)
        self.cores = nn.ModuleList(TrainableCore(core, start) for core, start in zip(module.cores, starts, strict=True))
        self._turn(module.pivot)
        self.bias = nn.Parameter(bias.detach().float().clone()) if bias is not None else None

    stands_for = torch.float32  # dtype of the weight that this layer replaces

    @property
    def weight(self) -> torch.Tensor:
        """NaN in the shape and dtype of the replaced weight: some models cast their activations to `weight.dtype`."""
        return no_weight(self.spec, self.stands_for, self.parts()[0].latent.device)

    def _turn(self, pivot: torch.Tensor | None) -> None:
        self.pivot = pivot
        # features[k]: output feature of row k (pivot rows first, then the others). order: the inverse permutation.
        self.features = None if pivot is None else pivot.long()
        self.order = None if self.features is None else self.features.argsort()

    @property
    def in_features(self) -> int:
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        return self.spec.out_features

    def parts(self) -> list[TrainableCore]:
        """The cores in order, typed."""
        return [core for core in self.cores if isinstance(core, TrainableCore)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spec.kind == "mpo":
            y = self._contracted(x)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        y = F.linear(x, self.cores[0]().to(x.dtype))
        if self.spec.kind == "lowrank":
            y = F.linear(y, self.cores[1]().to(x.dtype))
        elif self.order is not None:
            y = torch.cat([y, F.linear(y, self.cores[1]().to(x.dtype))], -1)
            y = _Permuted.apply(y, self.order, self.features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _contracted(self, x: torch.Tensor) -> torch.Tensor:
        """The MPO applied to x [..., in], see `contract_mpo` of the kernels."""
        from cai_runtime.kernels.slim_linear import MpoShape, contract_mpo

        spec = self.spec
        assert isinstance(spec.rank, tuple)
        shape = MpoShape(spec.in_features, spec.out_features, spec.out_dims, spec.in_dims, (1, *spec.rank, 1))

        def step(core: TrainableCore) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda rows: F.linear(rows, core().to(rows.dtype))

        y = contract_mpo(x.reshape(-1, spec.in_features), shape, [step(core) for core in self.parts()])
        return y.reshape(*x.shape[:-1], spec.out_features)

    def stored(self) -> StoredModule:
        """The module with its cores rounded to their stores."""
        return StoredModule(self.spec, [core.core_data() for core in self.parts()], self.pivot)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that `restore` needs beside the spec: fp32, the pivot int."""
        found: dict[str, torch.Tensor | None] = {"pivot": self.pivot, "bias": self.bias}
        for k, core in enumerate(self.parts()):
            found |= {f"latent_{k}": core.latent, f"scale_{k}": core.scale, f"zero_{k}": core.zero}
        return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}

    @classmethod
    def restore(cls, spec: ModuleSpec, tensors: dict[str, torch.Tensor]) -> TrainableLinear:
        """The inverse of `tensors`."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.spec = spec
        made._turn(tensors.get("pivot"))
        made.bias = nn.Parameter(tensors["bias"]) if "bias" in tensors else None
        made.cores = nn.ModuleList(
            TrainableCore.restore(
                store, shape, tensors[f"latent_{k}"], tensors.get(f"scale_{k}"), tensors.get(f"zero_{k}")
            )
            for k, (store, shape) in enumerate(zip(spec.store, spec.core_shapes, strict=True))
        )
        return made

    def _apply(self, fn, recurse=True):
        self.order, self.features = (t if t is None else fn(t) for t in (self.order, self.features))
        return super()._apply(fn, recurse)


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Set the submodule `name` of a model to `layer`. A `TrainableLinear` takes over the dtype of the weight it replaces."""
    parent, _, leaf = name.rpartition(".")
    before = model.get_submodule(name)
    if isinstance(layer, TrainableLinear) and isinstance(before, nn.Linear):
        layer.stands_for = before.weight.dtype
    setattr(model.get_submodule(parent), leaf, layer)


def no_weight(spec: ModuleSpec, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[out, in], all NaN, expanded from one element."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(spec.out_features, spec.in_features)


def _dtype(store: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[store]
