"""What the GPU backends demand of their arguments. Every violation is a KernelError that names the argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cai_runtime.errors import KernelError

if TYPE_CHECKING:
    from cai_runtime.kernels.weights import Core, LinearWeights

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)
STORES = (*ACTIVATIONS, torch.int8)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelError(message)


def check_tensor(
    name: str,
    t: torch.Tensor,
    *,
    shape: tuple[int | None, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    unit_stride: bool = True,
) -> None:
    """`t` is a tensor of `shape` (None: any size) on `device`, of one of `dtypes`; its last dimension is contiguous
    unless `unit_stride` is False."""
    # Runs at every launch: no message is formed before it is needed.
    if not isinstance(t, torch.Tensor):
        raise KernelError(f"{name} must be a tensor, not {type(t).__name__}")
    fits = t.dim() == len(shape)
    if fits:
        for want, got in zip(shape, t.shape, strict=True):
            fits = fits and (want is None or want == got)
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise KernelError(f"{name} has shape {tuple(t.shape)}, expected [{wanted}]")
    if t.device != device:
        raise KernelError(f"{name} is on {t.device}, expected {device}: move it with .to({str(device)!r})")
    if t.dtype not in dtypes:
        raise KernelError(f"{name} is {t.dtype}, expected one of {', '.join(str(d) for d in dtypes)}")
    if unit_stride and t.stride(-1) != 1 and t.numel() and t.shape[-1] != 1:
        raise KernelError(f"{name} must be contiguous in its last dimension: call .contiguous()")


def check_cache(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    shape: tuple[int | None, ...],
    device: torch.device,
) -> None:
    """Keys and values are of `shape`, [pages, Hkv, page_size, D], on `device`, in one dtype; with scales if that is int8."""
    check_tensor("k_cache", k_cache, shape=shape, device=device, dtypes=STORES)
    check_tensor("v_cache", v_cache, shape=tuple(k_cache.shape), device=device, dtypes=(k_cache.dtype,))
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_cache.dtype != torch.int8:
            require(scale is None, f"{name} is of an int8 cache, this one is {k_cache.dtype}")
            continue
        require(scale is not None, f"an int8 cache needs {name}")
        check_tensor(name, scale, shape=tuple(k_cache.shape[:3]), device=device, dtypes=(torch.float32,))
        require(scale.is_contiguous(), f"{name} must be contiguous")


def check_activation(name: str, x: torch.Tensor, width: int | None = None) -> None:
    """`x` is [rows, width] of an activation dtype; any strides."""
    if not isinstance(x, torch.Tensor):
        raise KernelError(f"{name} must be a tensor, not {type(x).__name__}")
    check_tensor(name, x, shape=(None, width), device=x.device, dtypes=ACTIVATIONS, unit_stride=False)


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if its last dimension is contiguous (rows may lie apart), else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check_core(name: str, core: Core, rows: int, cols: int, device: torch.device) -> None:
    if core.shape != (rows, cols):
        raise KernelError(f"{name} is a matrix {list(core.shape)}, expected [{rows}, {cols}]")
    if core.is_int4:
        check_tensor(f"{name}.data", core.data, shape=(rows, None), device=device, dtypes=(torch.uint8,))
        groups = (rows, -(-cols // core.group))
        check_tensor(f"{name}.scale", core.scale, shape=groups, device=device, dtypes=(torch.bfloat16,))
        if core.zero is not None:
            check_tensor(f"{name}.zero", core.zero, shape=groups, device=device, dtypes=(torch.uint8,))
        return
    check_tensor(f"{name}.data", core.data, shape=(rows, cols), device=device, dtypes=STORES)
    if core.data.dtype == torch.int8:
        require(core.scale is not None, f"{name} is int8 and has no scale: one fp32 scale per row is needed")
    if core.scale is not None:
        check_tensor(f"{name}.scale", core.scale, shape=(rows,), device=device, dtypes=(torch.float32,))


def check_weights(w: LinearWeights, device: torch.device, name: str = "w") -> None:
    """`w` is a dense, lowrank or interpolative linear whose tensors have the shapes its kind implies."""
    n, k = w.out_features, w.in_features
    require(
        w.kind in ("dense", "lowrank", "interpolative"),
        f"{name}.kind {w.kind!r} has no GPU kernel: dense, lowrank and interpolative have; use the reference backend",
    )
    require(n > 0 and k > 0, f"{name} must have at least one input and one output feature, has {k} and {n}")
    if w.kind == "dense":
        require(len(w.cores) == 1, f"{name}: a dense linear has one core, not {len(w.cores)}")
        _check_core(f"{name}.cores[0]", w.cores[0], n, k, device)
    else:
        r = w.rank
        require(len(w.cores) == 2, f"{name}: a {w.kind} linear has two cores, not {len(w.cores)}")
        require(isinstance(r, int) and r > 0, f"{name}.rank must be a positive integer, not {r!r}")
        assert isinstance(r, int)
        require(w.kind == "lowrank" or r <= n, f"{name}.rank {r} exceeds the {n} rows it selects from")
        _check_core(f"{name}.cores[0]", w.cores[0], r, k, device)
        _check_core(f"{name}.cores[1]", w.cores[1], n - r if w.kind == "interpolative" else n, r, device)
    if w.kind == "interpolative":
        require(w.pivot is not None, f"{name} is interpolative and has no pivot")
        assert w.pivot is not None
        check_tensor(f"{name}.pivot", w.pivot, shape=(n,), device=device, dtypes=(torch.int32,))
    if w.bias is not None:
        check_tensor(f"{name}.bias", w.bias, shape=(n,), device=device, dtypes=ACTIVATIONS)
