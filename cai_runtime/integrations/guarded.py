"""Weights of slim modules as other libraries meet them: true to look at, impossible to write to.

A slim module's `weight` is its dense weight, multiplied out or dequantized when somebody computes with it. Libraries also
write to a linear's weight: PEFT merges an adapter with `linear.weight.data += delta` or `linear.weight.data = merged`, and
starts some adapters (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) by taking their product off it. Cores can't take up either
change, so every such write is a KernelError.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cai_runtime.errors import KernelError
from cai_runtime.slim.module import ModuleWeights

REFUSAL = (
    "the weight of a slim module can't be changed in place: an adapter can't be merged into it, nor start by changing it "
    "(init_lora_weights pissa, olora, corda, loftq, lora_ga). Keep the adapter beside the model with another start, or work "
    "on a dense copy (`model.dequantize()`, `cai export --dense`)"
)
_NO_TRAINING = (
    "the codes of a packed slim module can't be trained: train an adapter (LoRA) on the module, leave it out of "
    "modules_to_save, or work on a dense copy (`model.dequantize()`, `cai export --dense`)"
)

_Tensor: Any = torch.Tensor
_IN_PLACE = frozenset(f"__i{name}__" for name in (
    "add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "and", "or", "xor", "lshift", "rshift", "matmul",
))  # fmt: skip
_HARMLESS = frozenset({"requires_grad_", "retain_grad_"})
_SET_REQUIRES_GRAD = frozenset({_Tensor.requires_grad.__set__, _Tensor.requires_grad_})
# What a `SlimWeight` answers without its numbers.
_STRUCTURE = frozenset(
    [getattr(_Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "requires_grad", "grad", "grad_fn", "is_leaf", "layout", "is_meta", "is_cuda",
        "is_cpu", "is_sparse", "is_quantized", "itemsize",
    )]
    + [_Tensor.size, _Tensor.dim, _Tensor.ndimension, _Tensor.numel, _Tensor.nelement, _Tensor.is_floating_point,
       _Tensor.is_complex, _Tensor.element_size, _Tensor.get_device, _Tensor.__len__, _Tensor.is_inference,
       torch.is_floating_point, torch.is_complex, torch.numel]
)  # fmt: skip
_SAME = frozenset({_Tensor.detach, torch.detach, _Tensor.data.__get__})


class ReadOnlyWeight(torch.Tensor):
    """A tensor that refuses operations in place. So do its clones and its views; all other results are plain tensors."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_writes(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return _read_only(func, args, result)


class SlimWeight(ReadOnlyWeight):
    """The dense weight [out, in] of a slim module, dequantized anew for each operation that needs its numbers.

    Shape, dtype and device cost nothing, and models ask for them in every forward pass. It counts as a `Parameter`.
    """

    _is_param = True  # for isinstance(weight, torch.nn.Parameter)
    _weights: ModuleWeights
    _codes: weakref.ref[StoredWeight] | None

    @staticmethod
    def of(weights: ModuleWeights, dtype: torch.dtype, codes: StoredWeight | None = None) -> SlimWeight:
        """weights: the module's tensors. dtype: of the dense weight. codes: the parameter that holds a packed module's
        codes, None where there is more than one core."""
        spec = weights.spec
        # NaN: an operation that got past `__torch_function__` would show.
        number = torch.full((), float("nan"), dtype=dtype, device=weights.cores[0].data.device)
        made = number.expand(spec.out_features, spec.in_features).as_subclass(SlimWeight)
        made._weights, made._codes = weights, None if codes is None else weakref.ref(codes)
        return made

    @property
    def codes(self) -> StoredWeight | None:
        """The parameter that holds the codes; None of a factorized module, or where it is gone."""
        return None if self._codes is None else self._codes()

    def is_of(self, weights: ModuleWeights, dtype: torch.dtype) -> bool:
        """Whether this is the dense weight of these tensors in this dtype."""
        mine, theirs = self._weights.cores[0], weights.cores[0]
        return self.dtype == dtype and mine.scale is theirs.scale and mine.zero is theirs.zero

    def dense(self) -> ReadOnlyWeight:
        """The numbers, a new tensor."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            dense = self._weights.dense(torch.float32).to(_Tensor.dtype.__get__(self))
            return dense.as_subclass(ReadOnlyWeight)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_writes(func, args, kwargs)
        own = args[0] if args else None
        if isinstance(own, SlimWeight):
            if func in _SAME:
                return own
            if func in _STRUCTURE:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            codes = own.codes
            if codes is not None and func is _Tensor.data_ptr:
                return codes.data_ptr()  # by which tied weights are known
            if codes is not None and func is _Tensor.to and (device := _device_alone(args[1:], kwargs)) is not None:
                return own._moved(codes, device)
        args, kwargs = _numbers(args), _numbers(kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return _read_only(func, args, result)

    def _moved(self, codes: StoredWeight, device: torch.device) -> torch.Tensor:
        """On another device. accelerate moves a module's parameters so: what it then registers are the codes, see
        `StoredWeight.__new__`."""
        there = stored_weight(codes.detach().to(device))
        if device.type == "meta":
            return there
        core = self._weights.cores[0]
        scale, zero = (None if t is None else t.to(device) for t in (core.scale, core.zero))
        weights = replace(self._weights, cores=[replace(core, data=there.detach(), scale=scale, zero=zero)])
        moved = SlimWeight.of(weights, self.dtype, there)
        moved.__dict__["_kept"] = there
        return moved


class StoredWeight(nn.Parameter):
    """The codes of a packed core: a parameter whose `.data` is read-only and that can't be trained."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> StoredWeight:
        if requires_grad:
            raise KernelError(_NO_TRAINING)
        codes = data.codes if isinstance(data, SlimWeight) else data
        if codes is None:
            raise KernelError(REFUSAL)
        plain = _Tensor.detach(codes).as_subclass(torch.Tensor)
        return torch.Tensor._make_subclass(cls, plain, False)

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return _Tensor.data.__get__(self).as_subclass(ReadOnlyWeight)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not self.__dict__.get("_moving"):  # see `StoredModule._apply`
            raise KernelError(REFUSAL)
        self.__dict__.pop("_dense", None)
        _Tensor.data.__set__(self, value.as_subclass(torch.Tensor))

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> StoredWeight:
        if requires_grad:
            raise KernelError(_NO_TRAINING)
        return self

    def as_dense(self, weights: ModuleWeights, dtype: torch.dtype) -> SlimWeight:
        """The dense weight of the module with these codes: one object as long as its tensors are the same, so that tied
        weights are known by identity."""
        known: SlimWeight | None = self.__dict__.get("_dense")
        if known is None or not known.is_of(weights, dtype):
            known = self.__dict__["_dense"] = SlimWeight.of(weights, dtype, self)
        return known

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeight:
        if id(self) not in memo:
            memo[id(self)] = stored_weight(self.detach().clone())
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return stored_weight, (self.detach(),)


def stored_weight(codes: torch.Tensor) -> StoredWeight:
    """Codes of a packed core as a parameter."""
    return StoredWeight(codes)


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises KernelError where `func` writes to a ReadOnlyWeight: an operation in place, `.data = `, or `out=`."""
    name = getattr(func, "__name__", "")
    if func in _SET_REQUIRES_GRAD:
        if isinstance(args[0], SlimWeight) and (args[1:2] or (kwargs.get("requires_grad", True),))[0]:
            raise KernelError(_NO_TRAINING)
        return
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name not in _HARMLESS)
    target = args[:1] if in_place or name in ("__setitem__", "__set__") else ()
    if any(isinstance(found, ReadOnlyWeight) for found in _flat((target, kwargs.get("out")))):
        raise KernelError(REFUSAL)


def _read_only(func: Any, args: Any, result: Any) -> Any:
    """Let clones and views of a read-only weight refuse writes, too: a write to a view would be lost in silence."""
    if isinstance(result, (tuple, list)):
        made = [_read_only(func, args, item) for item in result]
        return type(result)(made) if type(result) in (tuple, list) else result
    if not isinstance(result, torch.Tensor) or isinstance(result, ReadOnlyWeight):
        return result
    own = next((item for item in _flat(args) if isinstance(item, ReadOnlyWeight)), None)
    with torch._C.DisableTorchFunctionSubclass():
        keeps = func in (_Tensor.clone, torch.clone) or (own is not None and _shares(own, result))
        return result.as_subclass(ReadOnlyWeight) if keeps else result


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.layout == b.layout == torch.strided and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [item for inner in value for item in _flat(inner)]
    return [value]


def _numbers(value: Any) -> Any:
    """The arguments with every SlimWeight multiplied out."""
    if isinstance(value, SlimWeight):
        return value.dense()
    if type(value) in (tuple, list):
        return type(value)(_numbers(item) for item in value)
    if type(value) is dict:
        return {key: _numbers(item) for key, item in value.items()}
    return value


def _device_alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device of a call `tensor.to(...)` that names a device and no dtype."""
    if len(args) > 1 or set(kwargs) - {"device", "non_blocking", "copy"}:
        return None
    found = args[0] if args else kwargs.get("device")
    return torch.device(found) if isinstance(found, (str, int, torch.device)) else None
