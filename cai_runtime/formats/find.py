"""Which conversation format a checkpoint speaks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cai_runtime.errors import OptionValueError
from cai_runtime.formats.base import Format
from cai_runtime.formats.glm import GlmFormat
from cai_runtime.formats.harmony import HarmonyFormat
from cai_runtime.formats.hermes import GenericFormat, HermesFormat
from cai_runtime.formats.llama3 import Llama3Format
from cai_runtime.formats.llama4 import Lfm2Format, Llama4Format
from cai_runtime.formats.marked import MarkedFormat
from cai_runtime.formats.mistral import MistralFormat
from cai_runtime.formats.plain import PlainFormat
from cai_runtime.formats.qwen_coder import QwenCoderFormat
from cai_runtime.formats.template import template_text
from cai_runtime.scalars import shown

# A format, and what its templates write: the first whose text is there.
_SIGNS: tuple[tuple[type[MarkedFormat], tuple[str, ...]], ...] = (
    (HarmonyFormat, ("<|channel|>",)),
    (QwenCoderFormat, ("<function=",)),
    (GlmFormat, ("<arg_key>",)),
    (Lfm2Format, ("<|tool_call_start|>",)),
    (MistralFormat, ("[TOOL_CALLS]",)),
    (Llama4Format, ("<|python_start|>", "<|header_start|>")),
    (Llama3Format, ("<|python_tag|>", 'format {"name": function name, "parameters"')),
    (HermesFormat, ("<tool_call>",)),
)
_ALL: list[type[MarkedFormat]] = [PlainFormat, GenericFormat, *(found for found, _ in _SIGNS)]
FORMATS = {cls.name: cls for cls in _ALL}


def find_format(tokenizer: Any, config: Mapping[str, Any] | None = None, name: str | None = None) -> Format:
    """The format of a model's conversations.

    In this order: the one that is named; the one whose markers `response_template` of tokenizer_config.json holds
    (transformers' description of answers); the one whose markers the chat template writes; "generic".

    Args:
        tokenizer: transformers' tokenizer of the checkpoint.
        config: its config.json. Not needed so far: templates tell more.
        name: as in `Client(format=...)`.

    Raises:
        OptionValueError: there is no format of this name; the message lists them.
    """
    if name is not None:
        if name not in FORMATS:
            raise OptionValueError(f"There is no format {shown(name)}: 'format' must be one of {', '.join(FORMATS)}.")
        return FORMATS[name](tokenizer)
    described = json.dumps(getattr(tokenizer, "response_template", None) or {}, ensure_ascii=False)
    # In patterns, markers are written with backslashes.
    for text in (described.replace("\\", ""), template_text(tokenizer).replace('\\"', '"')):
        for found, signs in _SIGNS:
            if any(sign in text for sign in signs):
                return found(tokenizer)
    return GenericFormat(tokenizer)
