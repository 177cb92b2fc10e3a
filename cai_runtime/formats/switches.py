"""What a checkpoint's chat template says of itself: its text, and the switches that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from cai_runtime.formats.base import Capabilities
from cai_runtime.formats.template import chat_template


def template_text(tokenizer: Any) -> str:
    """The source of the tokenizer's chat templates; "" if it has none."""
    stored = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(map(str, stored.values())) if isinstance(stored, Mapping) else str(stored)


def capabilities_of(tokenizer: Any, calls: bool, native: bool, thinks: bool) -> Capabilities:
    """What the chat template takes, by `probes`. Hold the tokenizer's lock.

    Args:
        calls: the format has calls. native: it can read the calls of templates that take tools. thinks: there are thoughts.
    """
    forms = chat_template(tokenizer, for_tools=True).forms
    reasoning = forms.reasoning
    style: Literal["native", "generic"] = forms.tools if native else "generic"
    return Capabilities(
        tools=style if calls else None,
        parallel=style == "generic" or forms.turns.calls.parallel,
        reasoning=thinks or reasoning.switch is not None or reasoning.always,
        switch=reasoning.switch,
        efforts=reasoning.levels,
    )
