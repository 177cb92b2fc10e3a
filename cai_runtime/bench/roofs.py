"""The two roofs of a machine (Williams, Waterman and Patterson 2009), and the floor of a piece of work under them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Roofs:
    """Measured rates. read: bytes per second. matmul: operations per second of torch's matrix product, by dtype."""

    read: float
    matmul: dict[str, float]

    @property
    def flops(self) -> float:
        """The highest matrix rate, operations per second."""
        return max(self.matmul.values())

    def rate(self, dtype: str) -> float:
        """The matrix rate in `dtype`, operations per second: for fp32 its own, for a narrower dtype the highest of all.

        A processor without instructions for a narrow dtype can compute in fp32 instead.
        """
        return self.matmul["float32"] if dtype == "float32" else self.flops

    def floor(self, nbytes: float, flops: float, dtype: str) -> float:
        """The least time in seconds to read `nbytes` and, at the same time, do `flops` operations in `dtype`."""
        return max(nbytes / self.read, flops / self.rate(dtype))

    def higher(self, other: Roofs) -> Roofs:
        """The higher of each rate of two measurements: other work on the machine can only lower a rate."""
        rates = {name: max(rate, other.matmul[name]) for name, rate in self.matmul.items()}
        return Roofs(max(self.read, other.read), rates)

    def to_json(self) -> dict[str, Any]:
        return {
            "read_gb_per_s": self.read / 1e9,
            "matmul_gflop_per_s": {name: rate / 1e9 for name, rate in self.matmul.items()},
        }


def measure_roofs(device: str, threads: int | None = None) -> Roofs:
    """Measure both roofs as `bandwidth.py` describes. Takes a second or two."""
    from cai_runtime.bench.bandwidth import matmul_rates, read_bandwidth

    return Roofs(read_bandwidth(device, threads=threads), matmul_rates(device, threads=threads))


def bandwidth(job: dict[str, Any]) -> dict[str, Any]:
    """A job of `child.py`: {"device", "threads"} -> {"device": its resolved name, "gpu": the GPU's name or None,
    "bytes_per_s": read bandwidth}."""
    from cai_runtime.bench.bandwidth import read_bandwidth
    from cai_runtime.bench.machine import gpu_name
    from cai_runtime.engine.open import choose_device

    device = str(choose_device(job["device"]))
    return {"device": device, "gpu": gpu_name(device), "bytes_per_s": read_bandwidth(device, threads=job["threads"])}


def both(job: dict[str, Any]) -> dict[str, Any]:
    """A job of `child.py`: {"device", "threads"} -> {"device": its resolved name, "gpu": the GPU's name or None} and the
    fields of `Roofs`."""
    from cai_runtime.bench.machine import gpu_name
    from cai_runtime.engine.open import choose_device

    device = str(choose_device(job["device"]))
    return {"device": device, "gpu": gpu_name(device), **asdict(measure_roofs(device, job["threads"]))}
