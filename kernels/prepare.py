"""Makes linears ready to run: chooses the backend of a group of projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cai_runtime.errors import KernelError
from cai_runtime.kernels.backend import resolve_backend
from cai_runtime.kernels.cpu_library import Arena
from cai_runtime.kernels.slim_linear import CpuLinear, PreparedLinear, ReferenceLinear, SideBySide, cpu_mpo
from cai_runtime.kernels.weights import LinearWeights


def prepare(
    members: Sequence[LinearWeights],
    *,
    backend: str | None = None,
    arena: Arena | None = None,
    int8_activations: bool = False,
    activations: torch.dtype | None = None,
) -> PreparedLinear:
    """Make projections that share their input ready to run as one group.

    backend: "reference", "cpu", "triton" or "cuda"; None chooses by device and `CAI_KERNELS`. int8_activations: the input
    of every int8 core is rounded to int8 first (W8A8, see `quantized_rows`: on a GPU with a scale for each row, elsewhere
    for each 16 columns); cores of other stores are not touched by it.
    activations: the dtype that every x will have, so that the cuda backend need not keep the weights for others; None: any.
    Raises KernelError when the members differ in in_features or device, or the backend can't run them.
    """
    if not members:
        raise KernelError("a group of linears needs at least one member")
    if len({w.in_features for w in members}) != 1:
        raise KernelError(f"a group shares one input, but in_features are {[w.in_features for w in members]}")
    name = resolve_backend(backend, members[0].cores[0].data.device)
    if name == "reference":
        return ReferenceLinear(members, int8_activations)
    if name == "cpu":
        if all(w.kind != "mpo" for w in members):
            return CpuLinear(members, arena, int8_activations=int8_activations)
        parts: list[PreparedLinear] = []
        for w in members:
            if w.kind == "mpo":
                parts.append(cpu_mpo(w, arena, int8_activations=int8_activations))
            else:
                parts.append(CpuLinear([w], arena, int8_activations=int8_activations))
        return parts[0] if len(parts) == 1 else SideBySide(parts)
    from cai_runtime.kernels.gpu import prepare_linear

    return prepare_linear(members, name, int8_activations, activations)


def slim_linear(
    x: torch.Tensor, w: LinearWeights, residual: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """y = W x (+ bias + residual). x [M, in], y [M, out]. Prepares the weights on every call: for tests and one-offs."""
    return prepare([w], backend=backend)(x, residual)
