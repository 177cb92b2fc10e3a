"""What a conversation format provides."""

from __future__ import annotations

from typing import Protocol

from cai_runtime.engine.output import Output, OutputSpec


class Format(Protocol):
    """How a family of models writes its answers. One object serves every request of a model, from any thread."""

    def output(self, spec: OutputSpec) -> Output:
        """A new output for one sequence, whose events are of `formats.events`. Stop strings match in visible content
        only."""
        ...
