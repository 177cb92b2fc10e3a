"""The two roofs of a machine (Williams, Waterman and Patterson 2009) and the floor they put under a piece of work."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Roofs:
    """As measured. read: bytes per second; matmul: operations per second of torch's matrix product, by dtype."""

    read: float
    matmul: dict[str, float]

    @property
    def flops(self) -> float:
        """The highest of the matrix rates."""
        return max(self.matmul.values())

    def rate(self, dtype: str) -> float:
        """Operations per second of products of `dtype`: in fp32 that of fp32, in a narrower one the highest there is, for
        where a processor has no units for it, numbers can be widened."""
        return self.matmul["float32"] if dtype == "float32" else self.flops

    def floor(self, nbytes: float, flops: float, dtype: str) -> float:
        """Seconds that reading `nbytes` and `flops` operations in `dtype` take at least, the two at the same time."""
        return max(nbytes / self.read, flops / self.rate(dtype))

    def higher(self, other: Roofs) -> Roofs:
        """Of two measurements, the higher of each: other work on the machine can only lower one."""
        rates = {name: max(rate, other.matmul[name]) for name, rate in self.matmul.items()}
        return Roofs(max(self.read, other.read), rates)

    def to_json(self) -> dict[str, Any]:
        return {
            "read_gb_per_s": self.read / 1e9,
            "matmul_gflop_per_s": {name: rate / 1e9 for name, rate in self.matmul.items()},
        }


def measure_roofs(device: str, threads: int | None = None) -> Roofs:
    """A second or two. `bandwidth.py` says how."""
    from cai_runtime.bench.bandwidth import matmul_rates, read_bandwidth

    return Roofs(read_bandwidth(device, threads=threads), matmul_rates(device, threads=threads))


def bandwidth(job: dict[str, Any]) -> dict[str, Any]:
    """A job of `child.py`: {"device", "threads"} to the device's name and the bytes per second that it reads."""
    from cai_runtime.bench.bandwidth import read_bandwidth
    from cai_runtime.engine.open import choose_device

    device = str(choose_device(job["device"]))
    return {"device": device, "bytes_per_s": read_bandwidth(device, threads=job["threads"])}


def both(job: dict[str, Any]) -> dict[str, Any]:
    """The same with both roofs."""
    from cai_runtime.engine.open import choose_device

    device = str(choose_device(job["device"]))
    return {"device": device, **asdict(measure_roofs(device, job["threads"]))}
