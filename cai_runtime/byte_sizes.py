"""Numbers of bytes as people write them."""

from __future__ import annotations

import math
import re

from cai_runtime.errors import MemoryBudgetError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(value: int | str) -> int:
    """A number of bytes, or text such as "512MiB" or "2GB". Raises MemoryBudgetError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in UNITS or float(match[1]) <= 0:
        raise MemoryBudgetError(f'a memory budget is a positive number of bytes or text such as "2GiB", not {value!r}')
    return int(float(match[1]) * UNITS[match[2].lower()])


def format_bytes(count: int, *, at_least: bool = False) -> str:
    """A number of bytes as `parse_bytes` reads it, in the largest unit that is not above it: "32MiB", "1.5GiB".

    at_least: rounded up, so that what is read back is no less."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    if at_least:
        size = math.ceil(size * 10) / 10
    return f"{size:.1f}".removesuffix(".0") + unit
