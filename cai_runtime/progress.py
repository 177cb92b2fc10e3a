"""One way to show progress: a bar on standard error, off when that is no terminal, or as the caller says."""

from __future__ import annotations

import sys
from typing import Any


def progress_bar(what: str, *, total: float | None, unit: str = "it", show: bool | None = None, **options: Any) -> Any:
    """A tqdm bar named `what`. show: True, False, or None for "only on a terminal"."""
    from tqdm import tqdm

    disable = not (sys.stderr.isatty() if show is None else show)
    return tqdm(desc=what, total=total, unit=unit, disable=disable, dynamic_ncols=True, leave=False, **options)
