"""Dense to slim: calibrate, decompose, allocate, refine, heal, write, report. `compress` runs them all.

Light to import: torch and transformers are loaded when `compress` is first used. The package itself can be called, so
that `cai_runtime.compress(src, dst)` works wherever the package is what the name finds.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cai_runtime.compress.comparison import compare, quality
    from cai_runtime.compress.comparison_result import Comparison
    from cai_runtime.compress.pipeline import compress, dry_run
    from cai_runtime.compress.report import Report

__all__ = ["Comparison", "Report", "compare", "compress", "dry_run", "quality"]


def __getattr__(name: str) -> Any:
    if name in ("compress", "dry_run"):
        from cai_runtime.compress import pipeline

        return getattr(pipeline, name)
    if name in ("compare", "quality"):
        from cai_runtime.compress import comparison

        return getattr(comparison, name)
    if name == "Comparison":
        from cai_runtime.compress.comparison_result import Comparison

        return Comparison
    if name == "Report":
        from cai_runtime.compress.report import Report

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        from cai_runtime.compress.pipeline import compress

        return compress(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
