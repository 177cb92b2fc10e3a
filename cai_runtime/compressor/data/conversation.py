"""The fixed parts of a chat template, between the turns of user and assistant.

After the header of a user turn, a chat model also writes the user's turn (Xu et al. 2024, "Magpie: Alignment Data Synthesis
from Scratch by Prompting Aligned LLMs with Nothing"). So it can write whole conversations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Contents of the probe conversation: no template alters them, and none contains them.
_PROBES = ("Question-8317", "Answer-2946", "Question-5073")
# Templates that state the current date get this one, so that tokens do not depend on the day.
DATE = "01 Jan 2025"


@dataclass(frozen=True)
class ChatFrame:
    """Token ids of the fixed parts of a conversation.

    opening: before the first user turn. answer: between a user turn and an assistant turn. next: between an assistant turn
    and the next user turn.
    """

    opening: tuple[int, ...]
    answer: tuple[int, ...]
    next: tuple[int, ...]


def dated_template(tokenizer: Any) -> str:
    """The tokenizer's chat template with the date fixed to `DATE`. Raises ValueError when it has several and no default."""
    # A macro takes precedence over the function of the same name that transformers passes to templates.
    return "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}" + tokenizer.get_chat_template()


def chat_frame(tokenizer: Any) -> ChatFrame | None:
    """The frame of a tokenizer's chat template. None when it has no template, or the template rejects a plain conversation
    or does not render its contents verbatim."""
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
