"""RMSNorm (Zhang and Sennrich 2019), alone and with the residual addition before it; LayerNorm (Ba et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.cpu_library import check_rows
from cai_runtime.kernels.program import Value


@dataclass(frozen=True)
class RmsNorm:
    """weight [H] in the activations' dtype and eps: a norm that a linear applies to its input."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class LayerNorm:
    """weight and bias, each [H] in the activations' dtype, and eps: a norm that a linear applies to its input."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [M, H] / rms(x) * weight [H]; the mean of squares in at least fp32, the result in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(wide.dtype) * normed).to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def layer_norm_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension of x [M, H]; weight and bias [H].

    The variance is of the H deviations, not of H - 1. Computed in at least fp32; the result in x's dtype.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype) + bias.to(wide.dtype)).to(x.dtype)


def layer_norm_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """`layer_norm_reference` by torch's fused function, for GPUs."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def checked_weight(weight: torch.Tensor, what: str) -> torch.Tensor:
    """A norm's weight as the C++ kernels read it: fp32, contiguous. Raises KernelError for another dtype or device."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.dim() != 1:
        raise KernelError(
            f"{what}: the weight is fp32 [H] on the CPU, not {weight.dtype} {list(weight.shape)} {weight.device}"
        )
    return weight.contiguous()


def rms_norm_cpu(x: Any, weight: torch.Tensor, eps: float) -> Any:
    """x fp32 [M, H], or a Value of a pass being recorded."""
    weight = checked_weight(weight, "rms_norm")
    if isinstance(x, Value):
        if x.width != weight.shape[0]:
            raise KernelError(f"rms_norm: a weight of {weight.shape[0]} for rows of {x.width}")
        return x.recorder.note("rms_norm", [x], x.width, attributes={"eps": eps}, bindings={"weight": weight})
    x = check_rows(x, weight.shape[0], "rms_norm").contiguous()
    out = torch.empty_like(x)
    cpu_library.operation("rms_norm")(x, None, weight, eps, None, out)
    return out


def add_rms_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = checked_weight(weight, "add_rms_norm")
    x = check_rows(x, weight.shape[0], "add_rms_norm").contiguous()
    residual = check_rows(residual, weight.shape[0], "add_rms_norm's residual").contiguous()
    if residual.shape != x.shape:
        raise KernelError(f"add_rms_norm: {residual.shape[0]} rows of residual for {x.shape[0]} rows of x")
    out, total = torch.empty_like(x), torch.empty_like(x)
    cpu_library.operation("rms_norm")(x, residual, weight, eps, total, out)
    return out, total


def layer_norm_cpu(x: Any, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Any:
    """x fp32 [M, H] -> [M, H]. weight, bias: fp32 [H]. Or x a Value of a pass being recorded."""
    weight, bias = checked_weight(weight, "layer_norm"), checked_weight(bias, "layer_norm's bias")
    if weight.shape != bias.shape:
        raise KernelError(f"layer_norm: a weight of {weight.shape[0]} and a bias of {bias.shape[0]}")
    if isinstance(x, Value):
        if x.width != weight.shape[0]:
            raise KernelError(f"layer_norm: a weight of {weight.shape[0]} for rows of {x.width}")
        bindings = {"weight": weight, "bias": bias}
        return x.recorder.note("layer_norm", [x], x.width, attributes={"eps": eps}, bindings=bindings)
    x = check_rows(x, weight.shape[0], "layer_norm").contiguous()
    out = torch.empty_like(x)
    cpu_library.operation("layer_norm")(x, weight, bias, eps, out)
    return out
