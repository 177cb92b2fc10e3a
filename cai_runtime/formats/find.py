"""Which conversation format a checkpoint speaks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from cai_runtime.errors import ConversationError, OptionValueError
from cai_runtime.formats.base import Format
from cai_runtime.formats.glm import GlmFormat
from cai_runtime.formats.harmony import HarmonyFormat
from cai_runtime.formats.hermes import GenericFormat, HermesFormat
from cai_runtime.formats.llama3 import Llama3Format
from cai_runtime.formats.llama4 import Lfm2Format, Llama4Format
from cai_runtime.formats.marked import MarkedFormat
from cai_runtime.formats.mistral import MistralFormat
from cai_runtime.formats.plain import PlainFormat
from cai_runtime.formats.probes import TemplateForms
from cai_runtime.formats.program import TemplateProgram
from cai_runtime.formats.qwen_coder import QwenCoderFormat
from cai_runtime.formats.sample import reads
from cai_runtime.formats.template import DEFAULT, FOR_TOOLS, chat_template, template_of, template_text
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
_KINDS: tuple[type[MarkedFormat], ...] = (PlainFormat, GenericFormat, *(found for found, _ in _SIGNS))
FORMATS = {kind.name: kind for kind in _KINDS}


def find_format(tokenizer: Any, name: str | None = None) -> Format:
    """The format of a model's conversations.

    In this order: the one that is named; the one whose markers `response_template` of tokenizer_config.json holds
    (transformers' description of answers); the one whose markers the chat template writes, if its parser reads the call
    that the template writes; "generic".

    Args:
        tokenizer: transformers' tokenizer of the checkpoint.
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
    for kind in _signed(described.replace("\\", "")):
        return kind(tokenizer)
    source = template_text(tokenizer)
    kinds = _signed(source)
    if not kinds:
        return GenericFormat(tokenizer)
    try:
        forms = chat_template(tokenizer, for_tools=True).forms
    except ConversationError:  # a chat will say what is wrong with the template
        return kinds[0](tokenizer)
    return _reading(kinds, source, forms)(tokenizer)


def _signed(text: str) -> list[type[MarkedFormat]]:
    """The formats whose markers a text holds."""
    text = text.replace('\\"', '"')
    return [kind for kind, signs in _SIGNS if any(sign in text for sign in signs)]


def _reading(kinds: list[type[MarkedFormat]], source: str, forms: TemplateForms) -> type[MarkedFormat]:
    """The first that reads the template's calls. A model whose calls none of them reads has the tools as text, unless its
    answers need a parser in any case."""
    sample = forms.call_sample
    if sample is None or kinds[0].always_parsed:
        return kinds[0]
    return next((kind for kind in kinds if reads(kind, source, sample)), GenericFormat)


def tools_of(checkpoint: Path) -> Literal["native", "generic"] | None:
    """How a checkpoint's model is told of tools, by its files alone: see `Rendered.tools`. None if it can't chat."""
    stored, special_tokens = template_of(checkpoint)
    sources = stored if isinstance(stored, Mapping) else {DEFAULT: stored} if stored else {}
    source = sources.get(FOR_TOOLS) or sources.get(DEFAULT) or next(iter(sources.values()), None)
    if not source:
        return None
    return _probed(source, "\n".join(map(str, sources.values())), tuple(sorted(special_tokens.items())))


@lru_cache(maxsize=64)
def _probed(
    source: str, sources: str, special_tokens: tuple[tuple[str, str], ...]
) -> Literal["native", "generic"] | None:
    """source: the chat template for tools. sources: all of them."""
    kinds = _signed(sources)
    if not kinds:
        return "generic"
    try:
        forms = TemplateForms(TemplateProgram(source, DEFAULT, dict(special_tokens)))
    except ConversationError:  # no template; a chat will say what is wrong with it
        return None
    return "generic" if _reading(kinds, sources, forms) is GenericFormat else forms.tools
