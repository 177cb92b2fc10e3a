"""Byte budgets: reading them, and what a KV cache gets when none is given."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cai_runtime.errors import MemoryBudgetError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
DEFAULT_FRACTION = 0.25  # of the memory that is free after the weights are loaded


def parse_bytes(value: int | str) -> int:
    """A number of bytes, or text such as "512MiB" or "2GB". Raises MemoryBudgetError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in UNITS or float(match[1]) <= 0:
        raise MemoryBudgetError(f'a memory budget is a positive number of bytes or text such as "2GiB", not {value!r}')
    return int(float(match[1]) * UNITS[match[2].lower()])


def format_bytes(count: int) -> str:
    """A number of bytes as `parse_bytes` reads it, in the largest unit that is not above it: "32MiB", "1.5GiB"."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.1f}".removesuffix(".0") + unit


def available_memory(device: str) -> int:
    """Free bytes on the device, "cpu" or "cuda[:n]"; on the CPU what the system says is available, within the control
    group's limit."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free = int(found[1]) * 1024 if found else free
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def cache_budget(kv_cache: int | float | str | None, *, device: str, useful: int) -> int:
    """Bytes for the KV cache.

    kv_cache: bytes, text ("2GiB"), a fraction of the free memory (a float in (0, 1]), or None: a quarter of the free
    memory, at most `useful`, which is what the largest batch at full context could fill.
    """
    if kv_cache is None:
        return min(useful, int(available_memory(device) * DEFAULT_FRACTION))
    if isinstance(kv_cache, float) and 0 < kv_cache <= 1:
        return int(available_memory(device) * kv_cache)
    if isinstance(kv_cache, float):
        raise MemoryBudgetError(f"a fraction of memory is above 0 and at most 1, not {kv_cache}")
    return parse_bytes(kv_cache)
