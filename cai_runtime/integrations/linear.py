"""`torch.nn.Linear`s whose weight is a slim module's: y = W x + b through the factors, by our kernels.

Forward passes run the kernels of the device, with or without gradients; the gradient of the input goes back through the
factors in torch. Under `torch.compile`, in float64, and where the cores themselves are trained, the forward pass is the
reference in torch, too.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from cai_runtime.errors import KernelError
from cai_runtime.integrations.stored import StoredModule
from cai_runtime.kernels.backend import resolve_backend
from cai_runtime.kernels.prepare import prepare
from cai_runtime.kernels.slim_linear import MpoShape, PreparedLinear, contract_mpo, reference
from cai_runtime.kernels.weights import LinearWeights
from cai_runtime.layers.linear import kernel_weights
from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.stores import as_matrix, from_matrix


class SlimLinear(StoredModule, nn.Linear):  # type: ignore[override]
    """A linear layer over a slim module's cores. A `torch.nn.Linear` to those who ask, PEFT among them.

    spec: kind and stores. bias: whether there is one, held in `dtype`. dtype: of activations, see `compute_dtype`.
    Tensors are made on the meta device, for a checkpoint to fill.
    """

    def __init__(self, spec: ModuleSpec, *, bias: bool, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self._prepared: _Prepared | None = None
        self._is_hf_initialized = True  # nothing here for transformers to draw at random
        self._hold(spec, dtype)
        made = nn.Parameter(torch.empty(spec.out_features, dtype=dtype, device="meta")) if bias else None
        self.register_parameter("bias", made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features], float -> [..., out_features] in x's dtype.

        Raises KernelError for another width, or a dtype or device that the kernels don't take.
        """
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise KernelError(f"the linear takes {self.in_features} float features, not {x.dtype} {list(x.shape)}")
        rows = x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling() or x.dtype == torch.float64 or self._trains_cores():
            y = reference(rows, self.kernel_weights())
        elif torch.is_grad_enabled() and (rows.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            y = _Product.apply(rows, self.bias, self)
        else:
            y = self.run(rows)
        return y.reshape(*x.shape[:-1], self.out_features)

    def run(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [M, in_features] -> [M, out_features] by the device's kernels. No gradient."""
        ready = self._prepared
        if ready is None or not ready.is_for(self):
            ready = _Prepared(self)
            # Weights that come for one call (accelerate's offloading) are prepared for one call.
            self._prepared = None if _is_offloaded(self) else ready
        with torch.no_grad():
            if ready.backend == "cpu":
                return ready.linear(rows.to(torch.float32)).to(rows.dtype)
            return ready.linear(rows)

    def kernel_weights(self) -> LinearWeights:
        """The tensors as the kernels take them, in their stores; nothing is copied."""
        return kernel_weights(self.module_weights(), dtype=None, device=self._tensor(self.spec.core_names[0]).device)

    def _trains_cores(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for _, t in self.stored_tensors())

    def _apply(self, fn: Any, recurse: bool = True) -> SlimLinear:
        super()._apply(fn, recurse)
        self._prepared = None
        return self


class FactorizedLinear(SlimLinear):
    """A `SlimLinear` of more cores than one: no tensor of it is called `weight`."""


class TiedLinear(SlimLinear):
    """The head over a packed embedding: transformers ties its `weight`, scales and zero points stay the embedding's."""

    def __init__(self, table: StoredModule, *, bias: bool, dtype: torch.dtype):
        super().__init__(table.spec, bias=bias, dtype=dtype)
        for name in list(self._buffers):
            del self._buffers[name]
        self.__dict__["_table"] = table  # not a submodule: its tensors are the embedding's in the state_dict

    def protect(self) -> None:
        """As `StoredModule.protect`, for both who hold the weight."""
        table: StoredModule = self.__dict__["_table"]
        shared = table._parameters.get("weight") is self._parameters["weight"]
        super().protect()
        if shared:
            table._parameters["weight"] = self._parameters["weight"]

    def _tensor(self, name: str) -> torch.Tensor:
        own = self._parameters.get(name)
        if own is not None:
            return own
        tensor: torch.Tensor = self.__dict__["_table"]._tensor(name)
        device = self._tensor("weight").device
        if tensor.device.type == "meta" and device.type != "meta":
            raise KernelError(
                f"the {name} of a tied embedding was offloaded; load the model without `offload_buffers`, it is small"
            )
        return tensor.to(device)


class _Prepared:
    """A module's tensors made ready for the kernels of their device, and of which tensors that was."""

    def __init__(self, module: SlimLinear):
        tensors = [t for _, t in module.stored_tensors()] + ([] if module.bias is None else [module.bias])
        self._made_of = [(weakref.ref(t), _version(t)) for t in tensors]
        device = tensors[0].device
        self.backend = resolve_backend(None, device)
        with torch.no_grad():
            self.linear: PreparedLinear = prepare([module.kernel_weights()], backend=self.backend)
        if self.backend == "cpu":  # these kernels pack a copy
            for tensor in tensors:
                _let_go(tensor)

    def is_for(self, module: SlimLinear) -> bool:
        """Whether the module still holds the tensors it was made of, and nobody has written to them."""
        made_of = iter(self._made_of)
        for name in module.spec.tensors(""):
            known, version = next(made_of)
            tensor = module._tensor(name.removeprefix("."))
            if known() is not tensor or _version(tensor) != version:
                return False
        if module.bias is None:
            return True
        known, version = next(made_of)
        return known() is module.bias and _version(module.bias) == version


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's weights before each call and takes them away behind it."""
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook]))


_MADV_PAGEOUT = 21  # Linux 5.4: write back or drop these pages; what they hold stays


def _let_go(tensor: torch.Tensor) -> None:
    """Tell the system that the tensor is not needed in memory soon. transformers loads CPU tensors as views of the mapped
    file, whose pages then go; what is not a view of a file stays, or goes to swap. A hint: a failure doesn't matter."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.nbytes == 0:
        return
    start, page = tensor.data_ptr(), mmap.PAGESIZE
    first, last = start // page * page, -(-(start + tensor.nbytes) // page) * page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_PAGEOUT)


# ------------------------------------------------------------------------------------------------------- gradient


class _Product(torch.autograd.Function):
    """`SlimLinear.run` with the gradients of its input and its bias."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, bias: torch.Tensor | None, module: SlimLinear) -> torch.Tensor:
        # The weights of this moment: an offloaded module has none when the gradient comes.
        ctx.weights = module.kernel_weights() if ctx.needs_input_grad[0] else None
        ctx.bias_dtype = None if bias is None else bias.dtype
        return module.run(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_rows = input_gradient(grad, ctx.weights) if ctx.needs_input_grad[0] else None
        of_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return of_rows, of_bias, None


def input_gradient(grad: torch.Tensor, w: LinearWeights) -> torch.Tensor:
    """grad [M, out] W -> [M, in], through the factors in grad's dtype; one core at a time is unpacked."""

    def core(k: int) -> torch.Tensor:
        return w.cores[k].values(torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)

    match w.kind:
        case "dense":
            return grad @ core(0)
        case "lowrank":
            return (grad @ core(1)) @ core(0)
        case "interpolative":
            assert w.pivot is not None
            rank = w.cores[0].shape[0]
            ordered = grad[:, w.pivot.long()]
            return (ordered[:, :rank] + ordered[:, rank:] @ core(1)) @ core(0)
    # mpo: the transposed operator has the same bonds, with outputs and inputs exchanged in every core.
    shape = MpoShape(w.out_features, w.in_features, w.in_dims, w.out_dims, w.bonds)

    def multiply(k: int, rows: torch.Tensor) -> torch.Tensor:
        own = (w.bonds[k], w.out_dims[k], w.in_dims[k], w.bonds[k + 1])
        return rows @ as_matrix(from_matrix(core(k), own).transpose(1, 2)).T

    return contract_mpo(grad, shape, [lambda rows, k=k: multiply(k, rows) for k in range(len(w.cores))])  # type: ignore[misc]
