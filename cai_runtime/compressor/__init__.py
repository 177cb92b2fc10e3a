"""Dense to slim: calibrate, decompose, allocate, refine, heal, write, report. `compress` runs all stages.

Importing this package loads neither torch nor transformers; the first use of `compress` does. `pipeline.py` checks the
options, `run.py` runs the stages, `work.py` stores finished steps. Each stage has a folder:

data      text and speech for calibration and healing
stats     second moments of inputs and gradients: one pass over the blocks of the dense model
factor    error by rank of every layer, choice of ranks, and cores
train     training of cores: block by block, then the whole model
elastic   one checkpoint that opens at any keep

`cai_runtime.judge` measures the quality of a result.
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
