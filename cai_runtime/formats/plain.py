"""The conversation format of models whose whole output is the answer: no reasoning, no tool calls."""

from __future__ import annotations

from cai_runtime.engine.output import Output, OutputSpec, TextOutput


class PlainFormat:
    """See `base.Format`. All text is visible content."""

    def output(self, spec: OutputSpec) -> Output:
        return TextOutput(spec)
