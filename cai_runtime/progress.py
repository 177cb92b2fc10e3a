"""One way to show progress: a bar on standard error, off when that is no terminal, or as the caller says."""

from __future__ import annotations

import sys
from typing import Any


class NoBar:
    """Takes what a bar takes and shows nothing. (A disabled tqdm would still start its monitor thread.)"""

    def update(self, n: float = 1) -> None: ...
    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None: ...
    def set_description(self, desc: str | None = None, refresh: bool = True) -> None: ...
    def close(self) -> None: ...

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *exception: object) -> None: ...


def progress_bar(what: str, *, total: float | None, unit: str = "it", show: bool | None = None, **options: Any) -> Any:
    """A tqdm bar named `what`. show: True, False, or None for "only on a terminal"."""
    if not (sys.stderr.isatty() if show is None else show):
        return NoBar()
    from tqdm import tqdm

    return tqdm(desc=what, total=total, unit=unit, dynamic_ncols=True, leave=False, **options)
