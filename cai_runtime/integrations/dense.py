"""The dense weights of a model that transformers loaded from slim: to compress it again, or to leave the format."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from cai_runtime.errors import UnsupportedModelError
from cai_runtime.integrations.embedding import SlimEmbedding
from cai_runtime.integrations.linear import SlimLinear
from cai_runtime.integrations.stored import StoredModule


def slim_modules(model: nn.Module) -> dict[str, StoredModule]:
    """The modules of `model` that hold cores, by name. Dense modules in a float store are stock modules and not here."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StoredModule)}


def dense_state(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The state of the stock model that `model` stands for, tensor by tensor: (name, tensor), in the model's order.

    Slim modules give their weight multiplied out (a new tensor), everything else is the model's own. dtype: of floating
    tensors; None: each module's `compute_dtype`, and the others as they are. Tied weights come once, under the name they
    have in a checkpoint. At most one dense weight is made at a time.

    Raises UnsupportedModelError when tensors are on the meta device (offloaded by accelerate).
    """
    packed = slim_modules(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    done: set[str] = set()
    for name, tensor in model.state_dict().items():
        module_name, _, part = name.rpartition(".")
        if name in tied:
            continue
        if tensor.device.type == "meta":
            raise UnsupportedModelError(f"{name} is offloaded; load the model without disk or CPU offloading")
        module = packed.get(module_name)
        if module is not None and part != "bias":
            if module_name not in done:
                done.add(module_name)
                yield f"{module_name}.weight", module.dense_weight(dtype)
        elif dtype is not None and tensor.is_floating_point():
            yield name, tensor.to(dtype)
        else:
            yield name, tensor


def make_dense(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every slim module in `model` by the stock one with its dense weight, in place."""
    made: dict[int, nn.Parameter] = {}  # of a tied weight -> its one dense weight
    for name, module in slim_modules(model).items():
        codes = module._parameters.get("weight")
        dense = made.get(id(codes)) if codes is not None else None
        if dense is None:
            dense = nn.Parameter(module.dense_weight(dtype), requires_grad=False)
            if codes is not None:
                made[id(codes)] = dense
        model.set_submodule(name, _stock(module, dense))


def _stock(module: StoredModule, weight: nn.Parameter) -> nn.Module:
    rows, columns = weight.shape
    if isinstance(module, SlimEmbedding) and module.stock is not None:
        subclass = copy.copy(module.stock)
        del subclass.__dict__["weight"]
        subclass._parameters = {"weight": weight}
        return subclass.train(module.training)
    with torch.device("meta"):
        stock: nn.Embedding | nn.Linear
        if isinstance(module, SlimEmbedding):
            stock = nn.Embedding(rows, columns, padding_idx=module.padding_idx)
        else:
            stock = nn.Linear(columns, rows, bias=False)
    stock.weight = weight
    if isinstance(module, SlimLinear) and module.bias is not None:
        assert isinstance(stock, nn.Linear)
        stock.bias = nn.Parameter(module.bias.to(weight.dtype), requires_grad=False)
    return stock.train(module.training)
