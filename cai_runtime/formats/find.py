"""Which conversation format a checkpoint speaks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cai_runtime.errors import OptionValueError
from cai_runtime.formats.base import Format
from cai_runtime.formats.hermes import GenericFormat, HermesFormat
from cai_runtime.formats.marked import MarkedFormat
from cai_runtime.formats.plain import PlainFormat
from cai_runtime.formats.switches import template_text
from cai_runtime.scalars import shown

_CLASSES: tuple[type[MarkedFormat], ...] = (
    PlainFormat,
    GenericFormat,
    HermesFormat,
)
FORMATS = {cls.name: cls for cls in _CLASSES}

# What a format's templates write; of the formats whose signs are all there, the first.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (("hermes", ("<tool_call>", "arguments")),)


def find_format(tokenizer: Any, config: Mapping[str, Any] | None = None, name: str | None = None) -> Format:
    """The format of a model's conversations.

    In this order: the one that is named; the one whose markers `response_template` of tokenizer_config.json holds
    (transformers' description of answers); the one whose markers the chat template writes; "generic".

    Args:
        tokenizer: transformers' tokenizer of the checkpoint.
        config: its config.json, whose `model_type` decides where templates are alike.
        name: as in `Client(format=...)`.

    Raises:
        OptionValueError: there is no format of this name; the message lists them.
    """
    if name is not None:
        if name not in FORMATS:
            raise OptionValueError(f"There is no format {shown(name)}: 'format' must be one of {', '.join(FORMATS)}.")
        return FORMATS[name](tokenizer)
    template = getattr(tokenizer, "response_template", None)
    for text in (json.dumps(template, ensure_ascii=False) if template else "", template_text(tokenizer)):
        for found, signs in _SIGNS:
            if all(sign in text for sign in signs):
                return FORMATS[found](tokenizer)
    return GenericFormat(tokenizer)
