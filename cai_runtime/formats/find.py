"""Which conversation format a checkpoint speaks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from cai_runtime.errors import ConversationError, OptionValueError
from cai_runtime.formats.base import Format
from cai_runtime.formats.hermes import GenericFormat, HermesFormat
from cai_runtime.formats.marked import MarkedFormat
from cai_runtime.formats.plain import PlainFormat
from cai_runtime.formats.probes import TemplateForms
from cai_runtime.formats.program import TemplateProgram
from cai_runtime.formats.switches import template_text
from cai_runtime.formats.template import DEFAULT, FOR_TOOLS, chat_template, template_of
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
    (transformers' description of answers); the one whose markers the chat template writes; "generic". The latter also
    where the template does not take tools, so that calls are written as this library tells the model to.

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
                cls = FORMATS[found]
                return (GenericFormat if cls.openers and _tools_of(tokenizer) == "generic" else cls)(tokenizer)
    return GenericFormat(tokenizer)


def tools_of(checkpoint: Path) -> Literal["native", "generic"] | None:
    """How a checkpoint's model is told of tools, by its files alone: see `Rendered.tools`. None if it can't chat."""
    stored, special_tokens = template_of(checkpoint)
    sources = stored if isinstance(stored, Mapping) else {DEFAULT: stored} if stored else {}
    source = sources.get(FOR_TOOLS) or sources.get(DEFAULT) or next(iter(sources.values()), None)
    if not source:
        return None
    text = "\n".join(map(str, sources.values()))
    known = any(all(sign in text for sign in signs) for _, signs in _SIGNS)
    return _probed(source, tuple(sorted(special_tokens.items()))) if known else "generic"


@lru_cache(maxsize=64)
def _probed(source: str, special_tokens: tuple[tuple[str, str], ...]) -> Literal["native", "generic"] | None:
    try:
        return TemplateForms(TemplateProgram(source, DEFAULT, dict(special_tokens))).tools
    except ConversationError:  # no template; a chat will say what is wrong with it
        return None


def _tools_of(tokenizer: Any) -> Literal["native", "generic"] | None:
    try:
        return chat_template(tokenizer, for_tools=True).forms.tools
    except ConversationError:  # none, or several without a default: a chat names one or says what is wrong
        return None
