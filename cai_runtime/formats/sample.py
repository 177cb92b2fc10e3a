"""Whether a format reads what a chat template writes: the template's own call is put to the format's parser."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

from cai_runtime.engine.detokenizer import StopStrings
from cai_runtime.formats.conversation import Conversation
from cai_runtime.formats.events import ArgumentsEvent, ToolCallEvent
from cai_runtime.formats.marked import MarkedFormat, Turn
from cai_runtime.formats.parsing.stream import Stream
from cai_runtime.formats.parsing.writer import Writer
from cai_runtime.formats.probes import CallSample


def reads(kind: type[MarkedFormat], source: str, sample: CallSample) -> bool:
    """Whether a format finds the call in a template's answer. Needs no tokenizer: all its markers count as tokens.

    source: the chat template.
    """
    texts = dict.fromkeys((*kind.openers, *kind.closers, *kind.inner))
    tokenizer = SimpleNamespace(chat_template=source, added_tokens_decoder=dict(enumerate(texts)))
    found = kind(tokenizer)
    turn = Turn(Conversation((), tools=(sample.tool,)), found.is_thinking(sample.prompt[-40:]))
    writer = Writer(StopStrings(()), lambda: True, calls=True)
    stream = Stream(found.markers, writer)
    parser = found.parse(turn, stream)
    next(parser)
    spelled = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    for piece in filter(None, re.split(f"({spelled})", sample.answer)):
        stream.push(found.markers.token(piece) if piece in texts else piece)
    stream.push(None)
    next(parser, None)
    names = [event.name for event in writer.events if isinstance(event, ToolCallEvent)]
    arguments = "".join(event.text for event in writer.events if isinstance(event, ArgumentsEvent))
    return names == [sample.tool.name] and _as_texts(arguments) == _as_texts(json.dumps(sample.arguments))


def _as_texts(arguments: str) -> Any:
    """The arguments, each as text: some templates write numbers between quotes. None if they are no object."""
    try:
        return {key: str(value) for key, value in json.loads(arguments).items()}
    except (ValueError, AttributeError):
        return None
