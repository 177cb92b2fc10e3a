"""How much memory there is, and what of it a KV cache gets when no budget is given."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cai_runtime.byte_sizes import parse_bytes
from cai_runtime.errors import MemoryBudgetError

DEFAULT_FRACTION = 0.25  # of the memory that is free after the weights are loaded


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
