"""The fixed parts of a chat template, between which user and assistant speak.

With them a model writes whole conversations, the user's turns too: it has learned what comes after the user's header (Xu et
al. 2024, "Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with Nothing").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What is said in the rendered probe: words that no template changes or cuts, and that none holds.
_PROBES = ("Question-8317", "Answer-2946", "Question-5073")
# Templates that state today's date get this one, so that the same text has the same tokens tomorrow.
DATE = "01 Jan 2025"


@dataclass(frozen=True)
class ChatFrame:
    """Token ids of a conversation's fixed parts. opening: up to where the user begins. answer: from the end of the user's
    turn to where the assistant begins. next: from the end of the assistant's turn to where the user begins again."""

    opening: tuple[int, ...]
    answer: tuple[int, ...]
    next: tuple[int, ...]


def dated_template(tokenizer: Any) -> str:
    """The tokenizer's chat template, for which it is always `DATE`. Raises ValueError when it has several and no default."""
    # A macro of this name comes before the function that transformers gives to every template.
    return "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}" + tokenizer.get_chat_template()


def chat_frame(tokenizer: Any) -> ChatFrame | None:
    """The frame of a tokenizer's chat template. None when it has no template, or one that refuses a plain conversation of
    user and assistant or does not show it word by word."""
    from jinja2.exceptions import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return None
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": content} for role, content in zip(roles, _PROBES, strict=True)]
    try:
        rendered = tokenizer.apply_chat_template(
            turns, chat_template=dated_template(tokenizer), tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    parts = []
    for probe in _PROBES:
        part, found, rendered = rendered.partition(probe)
        if not found:
            return None
        parts.append(part)
    opening, answer, following = (
        tuple(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) for part in parts
    )
    if not (opening and answer and following):
        return None
    return ChatFrame(opening, answer, following)
