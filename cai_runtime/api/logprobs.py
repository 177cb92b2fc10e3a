"""Log probabilities in replies: which tokens an event has, and what OpenAI's two shapes say of them.

The tokens of the visible text are listed, each with the piece that shows it: a token whose text is held back, because its
character is unfinished or a stop string may begin, comes with the piece that follows. Tokens of thoughts, calls and markers,
the token that ends a text, and those of a stop string that was cut off are not listed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_choice import Logprobs

from cai_runtime.api.errors import BadRequestError
from cai_runtime.engine.detokenizer import Detokenizer, TokenDecoder
from cai_runtime.engine.request import Delta, Finished, TokenLogprobs
from cai_runtime.formats.events import ChatEvent, TextEvent

MAX_CHAT_TOP = 20  # OpenAI's limits
MAX_COMPLETION_TOP = 5


@dataclass(frozen=True)
class EventLogprobs:
    """What is known of an event's tokens.

    tokens: of the event. prompt: of the prompt's tokens, None for its first, with a choice's first event where the request
    wants them; else None.
    """

    tokens: tuple[TokenLogprobs, ...]
    prompt: tuple[TokenLogprobs | None, ...] | None = None


class Aligner:
    """Gives each event of one choice what the engine says of its tokens. Deltas and their events in their order."""

    def __init__(self, prompt: tuple[TokenLogprobs | None, ...] | None = None):
        self._prompt = prompt
        self._left: deque[TokenLogprobs] = deque()

    def add(self, found: Iterable[TokenLogprobs]) -> None:
        """The next tokens that were generated."""
        self._left += found

    def take(self, event: ChatEvent) -> EventLogprobs:
        """Those of the next event."""
        tokens = tuple(self._left.popleft() for _ in event.token_ids)
        assert tuple(found.token_id for found in tokens) == tuple(event.token_ids), "a token is in exactly one event"
        prompt, self._prompt = self._prompt, None
        return EventLogprobs(tokens, prompt)


class Aligners:
    """Of all choices of a stream, made as they begin."""

    def __init__(self) -> None:
        self._of: dict[int, Aligner] = {}

    def events(
        self, index: int, delta: Delta, prompt: tuple[TokenLogprobs | None, ...] | None
    ) -> Iterable[tuple[ChatEvent, EventLogprobs | None]]:
        """A delta's events. prompt: of the request's prompt."""
        if delta.logprobs is None:
            return ((event, None) for event in delta.events)
        aligner = self._of.setdefault(index, Aligner(prompt))
        aligner.add(delta.logprobs)
        return ((event, aligner.take(event)) for event in delta.events)


def aligned(done: Finished) -> list[tuple[ChatEvent, EventLogprobs | None]]:
    """The same of a whole answer."""
    if done.logprobs is None:
        return [(event, None) for event in done.events]
    aligner = Aligner(done.prompt_logprobs)
    aligner.add(done.logprobs)
    return [(event, aligner.take(event)) for event in done.events]


def chat_count(params: Mapping[str, Any]) -> int | None:
    """How many of the likeliest tokens a chat request wants beside each token; None: no logprobs at all.

    Raises BadRequestError: `top_logprobs` without `logprobs`."""
    top = params.get("top_logprobs", 0)
    if params.get("logprobs"):
        return top
    if top:
        raise BadRequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs", code="invalid_value")
    return None


def chat_entries(decoder: TokenDecoder, found: Iterable[TokenLogprobs]) -> list[ChatCompletionTokenLogprob]:
    """Chat's entries, one for each token. `token` is its text, or, where its bytes are no whole characters, these escaped
    (\\xe2\\x80), as OpenAI writes them."""
    return [
        ChatCompletionTokenLogprob(
            token=_text(decoder.bytes_of(each.token_id)),
            bytes=list(decoder.bytes_of(each.token_id)),
            logprob=each.logprob,
            top_logprobs=[
                TopLogprob(token=_text(decoder.bytes_of(t)), bytes=list(decoder.bytes_of(t)), logprob=value)
                for t, value in each.top
            ],
        )
        for each in found
    ]


def chat_logprobs(
    decoder: TokenDecoder, events: Iterable[tuple[ChatEvent, EventLogprobs | None]]
) -> ChoiceLogprobs | None:
    """Chat's logprobs of the visible content of these events; None where none are wanted."""
    content: list[ChatCompletionTokenLogprob] = []
    wanted = False
    for event, found in events:
        wanted |= found is not None
        if found is not None and isinstance(event, TextEvent):
            content += chat_entries(decoder, found.tokens)
    return ChoiceLogprobs(content=content, refusal=None) if wanted else None


def _text(content: bytes) -> str:
    return content.decode("utf-8", "backslashreplace")


def _key(content: bytes) -> str:
    """A token in the shape of completions: its text, or "bytes:" and its bytes where these are no whole characters."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class PromptLogprobs(Logprobs):
    """Logprobs with those of a prompt, whose first token has none: OpenAI sends null, though its type says a number."""

    token_logprobs: list[float | None] | None = None  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None] | None = None  # type: ignore[assignment]


class CompletionLogprobs:
    """The lists of one choice of a text completion, piece by piece.

    text_offset is where a token's text begins in the choice's text, in characters; of one that continues a character, where
    that begins. top_logprobs has the token itself, beside the likeliest ones that are asked for.

    Args:
        prompt_ids: of the prompt.
        echo: the prompt's text, where it is put before the answer.
        added: how many tokens the tokenizer put before the prompt's text: they have no place in it.
    """

    def __init__(self, decoder: TokenDecoder, prompt_ids: Sequence[int], echo: str = "", added: int = 0):
        self._decoder = decoder
        self._prompt_ids, self._added = prompt_ids, added
        self._answer = Detokenizer(decoder, prompt_ids)
        self._at = len(echo)

    def piece(self, found: EventLogprobs) -> PromptLogprobs:
        """Of the next event that has text, with those of the prompt where the event brings them."""
        lists = PromptLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        if found.prompt is not None:
            echoed, at = Detokenizer(self._decoder, skip_special_tokens=False), 0
            for i, (token_id, each) in enumerate(zip(self._prompt_ids, found.prompt, strict=True)):
                self._add(lists, token_id, each, at)
                at += len(echoed.feed(token_id)) if i >= self._added else 0
        for known in found.tokens:
            self._add(lists, known.token_id, known, self._at)
            self._at += len(self._answer.feed(known.token_id))
        return lists

    def _add(self, lists: PromptLogprobs, token_id: int, found: TokenLogprobs | None, at: int) -> None:
        assert lists.text_offset is not None and lists.tokens is not None
        assert lists.token_logprobs is not None and lists.top_logprobs is not None
        key = _key(self._decoder.bytes_of(token_id))
        lists.text_offset.append(at)
        lists.tokens.append(key)
        if found is None:
            lists.token_logprobs.append(None)
            lists.top_logprobs.append(None)
            return
        top: dict[str, float] = {}
        for other, value in (*found.top, (token_id, found.logprob)):
            top.setdefault(_key(self._decoder.bytes_of(other)), value)  # of tokens written alike the likeliest
        lists.token_logprobs.append(found.logprob)
        lists.top_logprobs.append(top)


def joined(pieces: Iterable[PromptLogprobs]) -> PromptLogprobs:
    """The lists of a whole choice."""
    whole = PromptLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for piece in pieces:
        for name in PromptLogprobs.model_fields:
            getattr(whole, name).extend(getattr(piece, name))
    return whole


def mean_logprob(done: Finished) -> float:
    """By which `best_of` chooses: of all generated tokens, the one that ended the text included."""
    found = done.logprobs or ()
    return sum(each.logprob for each in found) / max(len(found), 1)
