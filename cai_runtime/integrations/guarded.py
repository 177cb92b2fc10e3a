"""Weights that can be looked at and not written to: what code that changes `linear.weight` in place meets.

PEFT merges an adapter with `linear.weight.data += delta`. A factorized linear has no weight that could take it up, and an
int8 one would round it away in silence; so the attempt is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cai_runtime.errors import KernelError

_IN_PLACE = frozenset(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod"))
_KEEPS = frozenset({torch.Tensor.clone, torch.Tensor.detach, torch.Tensor.data.__get__})  # type: ignore[attr-defined]
_HARMLESS = frozenset({"requires_grad_", "retain_grad_"})


class ReadOnlyWeight(torch.Tensor):
    """A tensor that refuses operations in place; so do its clones, all other results are plain tensors."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        writes = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name not in _HARMLESS)
        if isinstance(args[0] if args else None, cls) and (writes or name == "__setitem__"):
            raise KernelError(
                "the weight of a slim module can't be changed in place: adapters can't be merged into it. Keep the adapter "
                "beside the model, or merge it into a dense copy (`model.dequantize()`, `cai export --dense`)"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if func in _KEEPS and isinstance(result, torch.Tensor) else result


class StoredWeight(nn.Parameter):
    """The packed codes of a dense module. They are a parameter like any other, except that `.data` is read-only, and that
    `.dtype` is what the module computes in: models cast what they give to a layer to its weight's dtype. The codes' own is
    that of `.detach()`."""

    compute_dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        # accelerate brings back what it offloaded in the dtype of the placeholder that it left.
        own: torch.dtype = torch.Tensor.dtype.__get__(self)  # type: ignore[attr-defined]
        return own if self.compute_dtype is None or self.is_meta else self.compute_dtype

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self).as_subclass(ReadOnlyWeight)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if isinstance(value, ReadOnlyWeight):
            value = value.as_subclass(torch.Tensor)
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeight:
        if id(self) not in memo:
            memo[id(self)] = stored_weight(self.detach().clone(), self.compute_dtype)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return stored_weight, (self.detach(), self.compute_dtype)


def stored_weight(codes: torch.Tensor, compute_dtype: torch.dtype | None) -> StoredWeight:
    """Codes of a module that computes in `compute_dtype`."""
    made = StoredWeight(codes, requires_grad=False)
    made.compute_dtype = compute_dtype
    return made
