"""Plays transcripts to a format's output, and folds the events."""

import re
from dataclasses import dataclass, field

from cai_runtime.engine.detokenizer import TokenDecoder
from cai_runtime.engine.output import OutputSpec
from cai_runtime.formats.conversation import Conversation, Tool
from cai_runtime.formats.events import ArgumentsEvent, EndEvent, MarkerEvent, ReasoningEvent, TextEvent, ToolCallEvent
from cai_runtime.formats.marked import Turn
from cai_runtime.formats.messages import Message

WEATHER = Tool(
    "get_weather",
    "The weather of a place.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "where": {"type": "object", "properties": {"lat": {"type": "number"}}},
            "tags": {"type": "array", "items": {"type": "string"}},
            "scale": {"enum": ["C", "F"]},
            "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        },
        "required": ["city"],
    },
)
TIME = Tool("get_time", parameters={"type": "object", "properties": {}})
ASKED = (Message("user", "What is the weather in Oslo?"),)


def turn_of(*, tools=(WEATHER, TIME), thinks=False, **options):
    return Turn(Conversation(ASKED, tools=tuple(tools), **options), thinks)


@dataclass
class Folded:
    """A reply. calls: [name, arguments], ids left out."""

    content: str = ""
    reasoning: str = ""
    calls: list = field(default_factory=list)
    reason: str = ""


def fold(events):
    folded = Folded()
    ids = []
    for event in events:
        match event:
            case TextEvent():
                assert event.text
                folded.content += event.text
            case ReasoningEvent():
                assert event.text
                folded.reasoning += event.text
            case ToolCallEvent():
                assert event.index == len(folded.calls)
                ids.append(event.call_id)
                folded.calls.append([event.name, ""])
            case ArgumentsEvent():
                assert event.text and event.index == len(folded.calls) - 1
                folded.calls[-1][1] += event.text
            case MarkerEvent():
                assert event.token_ids
            case EndEvent():
                folded.reason = event.finish_reason
    assert len(set(ids)) == len(ids) or set(ids) == {""}
    assert sum(isinstance(event, EndEvent) for event in events) == 1 and isinstance(events[-1], EndEvent)
    return folded


def tokens_of(tokenizer, text, markers, by_character=False):
    """The text as tokens; the markers that are tokens are those, but where they are spelled with ‹ and › for < and >.
    by_character: no token holds more than a character of the text between."""
    ids = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    tokens = []
    for piece in re.split(f"({'|'.join(map(re.escape, sorted(markers, key=len, reverse=True)))})", text):
        if piece in markers and piece in ids:
            tokens.append(ids[piece])
        elif piece:
            piece = piece.translate({ord("‹"): "<", ord("›"): ">"})
            for part in piece if by_character else [piece]:
                tokens += spelled(tokenizer, part)
    return tokens


def spelled(tokenizer, text):
    """The text in tokens that are no markers: where the tokenizer finds one in it, character by character."""
    added = set(tokenizer.added_tokens_decoder)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return (
        ids if added.isdisjoint(ids) else [i for char in text for i in tokenizer.encode(char, add_special_tokens=False)]
    )


def play(output, tokens, cuts=None, finish=True):
    """The events of tokens fed in groups of these sizes (None: one by one)."""
    events, at, taken = [], 0, []
    for size in [1] * len(tokens) if cuts is None else [*cuts, len(tokens)]:
        if not (group := tokens[at : at + size]):
            continue
        delta = output.feed(group)
        events += delta.events
        taken += delta.token_ids
        at += size
        if delta.finish_reason is not None:
            break
    else:
        delta = output.finish()
        events += delta.events
    assert [token for event in events for token in event.token_ids] == taken, "each token is in one event, in order"
    assert events[-1].finish_reason == delta.finish_reason
    return events


def spec_of(tokenizer, ends=("</s>",), stop=(), prompt="x", min_tokens=0):
    ids = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    return OutputSpec(TokenDecoder(tokenizer), prompt_ids, {ids[end]: None for end in ends}, tuple(stop), min_tokens)
