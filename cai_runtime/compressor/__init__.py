"""Dense to slim: calibrate, decompose, allocate, refine, heal, write, report. `compress` runs them all.

Light to import: torch and transformers are loaded when `compress` is first used. `pipeline.py` checks the options, `run.py`
runs the stages, `work.py` keeps what is done. Each stage has a folder:

data      the text and the speech that calibration and healing read
stats     what a layer's inputs and gradients look like: one pass over the blocks of the dense model
factor    a layer as cores of some rank, what that loses, and which rank every layer gets
train     cores trained block by block, then the whole model healed
elastic   one checkpoint that opens at any keep

What a result is worth is measured in `cai_runtime.judge`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cai_runtime.compressor.pipeline import compress, dry_run
    from cai_runtime.compressor.report import Report
    from cai_runtime.judge.comparison import compare, quality
    from cai_runtime.judge.comparison_result import Comparison

__all__ = ["Comparison", "Report", "compare", "compress", "dry_run", "quality"]


def __getattr__(name: str) -> Any:
    if name in ("compress", "dry_run"):
        from cai_runtime.compressor import pipeline

        return getattr(pipeline, name)
    if name in ("compare", "quality"):
        from cai_runtime.judge import comparison

        return getattr(comparison, name)
    if name == "Comparison":
        from cai_runtime.judge.comparison_result import Comparison

        return Comparison
    if name == "Report":
        from cai_runtime.compressor.report import Report

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
