"""What a checkpoint's chat template says of itself: its text, and the switches that it reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cai_runtime.formats.base import Capabilities

EFFORTS = ("none", "low", "medium", "high", "xhigh", "max")
SWITCHES = ("enable_thinking", "thinking")


def template_text(tokenizer: Any) -> str:
    """The source of the tokenizer's chat templates; "" if it has none."""
    stored = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(map(str, stored.values())) if isinstance(stored, Mapping) else str(stored)


def capabilities_of(tokenizer: Any, calls: bool, native: bool, thinks: bool) -> Capabilities:
    """Read from the template's text.

    Args:
        calls: the format has calls. native: the template describes the tools itself. thinks: there are thoughts.
    """
    text = template_text(tokenizer)
    switch = next((name for name in SWITCHES if re.search(rf"\b{name}\b", text)), None)
    takes_effort = re.search(r"\breasoning_effort\b", text) is not None
    quoted = set(re.findall(r"""['"](\w+)['"]""", text))
    named = tuple(effort for effort in EFFORTS if effort in quoted)
    return Capabilities(
        tools=("native" if native else "generic") if calls else None,
        parallel="single tool-calls at once" not in text,
        reasoning=thinks or takes_effort,
        switch=switch,
        efforts=(named if len(named) > 1 else ("low", "medium", "high")) if takes_effort else (),
    )
