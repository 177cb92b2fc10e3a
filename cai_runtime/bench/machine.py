"""Describes the machine and the software versions of a measurement. Imports neither torch nor a compiled library."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from cai_runtime.kernels.processors import usable_processors

DISTRIBUTIONS = {
    "cai_runtime": "cai-runtime",
    "torch": "torch",
    "transformers": "transformers",
    "triton": "triton",
    "tvm-ffi": "apache-tvm-ffi",
    "openai": "openai",
}


def describe_machine() -> dict[str, Any]:
    """Processor, memory in bytes and system of this machine. Touches no GPU."""
    return {
        "cpu": cpu_name(),
        "cpu_threads": os.cpu_count() or 1,
        "usable_threads": usable_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.system(),
        "architecture": platform.machine(),
    }


def usable_threads() -> int:
    """Hardware threads that this process may use, by its affinity and its control group's CPU quota."""
    return usable_processors()


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        return found[1].strip()
    return platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Bytes of the first processor's largest cache; 0 if the system does not report it."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if found := re.fullmatch(r"(\d+)([KM]?)", text):
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]])
    return max(sizes)


def cache_bytes(device: str) -> int:
    """Bytes of the last-level cache, on a GPU of L2; 0 if the system does not report it."""
    if not device.startswith("cuda"):
        return last_level_cache()
    import torch

    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def available_memory(device: str) -> int:
    """Bytes that can still be allocated, on the machine without swapping or on the GPU."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (found := re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)):
        return int(found[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gpu_name(device: str) -> str | None:
    """The name of a GPU, None for a CPU. Imports torch."""
    if not device.startswith("cuda"):
        return None
    import torch

    return str(torch.cuda.get_device_properties(device).name)


def describe_gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory in bytes of every GPU that torch sees. Imports torch."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory})
    return found


def versions() -> dict[str, str | None]:
    """Installed versions by name, None for a package that is not installed. Imports no package."""
    return {"python": platform.python_version(), **{name: version_of(dist) for name, dist in DISTRIBUTIONS.items()}}


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it; None if it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
