"""Which of a stock model's modules a slim module can stand for."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

OUT, IN = 6, 8  # of the matrix that a subclass is tried with


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes y = W x + b and nothing else: a torch.nn.Linear, or a subclass that does so, too (Falcon's;
    not one that returns a choice of experts). A subclass with a forward function of its own is tried on a small matrix."""
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear) or set(module._parameters) != {"weight", "bias"} or module._buffers:
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    g = torch.Generator("cpu").manual_seed(0)
    small = copy.copy(module)
    small.in_features, small.out_features = IN, OUT

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float32, device="cpu")

    weight = nn.Parameter(numbers(OUT, IN), requires_grad=False)
    bias = None if module.bias is None else nn.Parameter(numbers(OUT), requires_grad=False)
    small._parameters = {"weight": weight, "bias": bias}
    x = 10 * numbers(2, 3, IN)
    try:
        with torch.no_grad():
            y = type(module).forward(small, x)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):  # it is not called as a Linear is
        return False
    return (
        isinstance(y, torch.Tensor)
        and y.shape == (2, 3, OUT)
        and torch.allclose(y, F.linear(x, weight, bias), atol=1e-4)
    )
