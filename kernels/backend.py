"""Which kernels run: `reference` (torch), `cpu` (C++), `triton`, `cuda` (linears in CUDA C++, where they fit)."""

from __future__ import annotations

import os

import torch

from cai_runtime.errors import KernelError

BACKENDS = ("reference", "cpu", "triton", "cuda")


def resolve_backend(name: str | None, device: torch.device | str) -> str:
    """The backend for tensors on `device`: `name`, else the environment's `CAI_KERNELS`, else the best there is.

    Raises KernelError for an unknown name, or one that can't run on that device.
    """
    device_type = torch.device(device).type
    wanted = name or os.environ.get("CAI_KERNELS") or None
    if wanted is None:
        return best_backend(device_type)
    if wanted not in BACKENDS:
        where = "backend" if name else "CAI_KERNELS"
        raise KernelError(f"{where} {wanted!r} is not one of {', '.join(BACKENDS)}")
    if wanted == "cpu" and device_type != "cpu":
        raise KernelError(f"the cpu kernels can't run on {device_type}; choose reference, triton or cuda")
    interpreted = wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if wanted in ("triton", "cuda") and device_type != "cuda" and not interpreted:
        raise KernelError(f"the {wanted} kernels can't run on {device_type}; choose reference or cpu")
    return wanted


def best_backend(device_type: str) -> str:
    if device_type == "cpu":
        from cai_runtime.kernels import cpu_library

        cpu_library.library()  # an explicit error when it is not built, rather than a slow surprise
        return "cpu"
    if device_type == "cuda":
        # Not "cuda" before a GPU has run it: Triton's kernels come out of a compiler that many use.
        return "triton"
    return "reference"


def describe_backends() -> dict[str, str]:
    """Name -> what there is, or why there is nothing; for `cai env`."""
    from cai_runtime.kernels import cpu_library

    found = {"reference": f"torch {torch.__version__}"}
    if cpu_library.available():
        isas = cpu_library.instruction_sets()
        rounded = "int8" if cpu_library.prefers_int8() else "fp32, in encoders int8"
        found["cpu"] = (
            f"{cpu_library.instruction_set()} of {', '.join(isas)}; {cpu_library.num_threads()} threads; "
            f"activations of int8 weights: {rounded}"
        )
    else:
        found["cpu"] = "not built"
    try:
        import triton

        gpu = "on " + torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU seen"
        found["triton"] = f"triton {triton.__version__}, {gpu}"
    except ImportError:
        found["triton"] = "triton is not installed"
    from cai_runtime.kernels import cuda

    found["cuda"] = "built" if cuda.available() else "not built, or no GPU seen"
    return found
