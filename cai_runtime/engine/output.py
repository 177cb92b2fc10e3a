"""From the tokens of one sequence to events: one object per sequence, which also finds the end of its text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cai_runtime.engine.detokenizer import Detokenizer, StopStrings, TokenDecoder
from cai_runtime.engine.request import Delta, EndEvent, FinishReason, TextEvent
from cai_runtime.errors import InvalidRequestError


@dataclass(frozen=True)
class OutputSpec:
    """What an output is made for.

    decoder: of the engine. prompt_ids: the tokens before the first generated one. ends: tokens that end the text, each
    with the stop string that it is the text of, or None. stop: stop strings. min_tokens: until so many tokens were
    generated, neither a token of `ends` nor a stop string ends the text. skip_special_tokens: leave special tokens out
    of the text.
    """

    decoder: TokenDecoder
    prompt_ids: Sequence[int]
    ends: Mapping[int, str | None]
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    skip_special_tokens: bool = True


class Output(Protocol):
    """Turns the tokens of one sequence into events. Called by the engine's thread alone.

    The events of a text do not depend on how its tokens were grouped into feeds, so that folding the events of a whole
    reply gives what a stream of it showed. The last event is an `EndEvent`. Tokens that were fed are final.
    """

    def feed(self, token_ids: Sequence[int]) -> Delta:
        """Add generated tokens. The delta has the events that became certain, and the tokens that belong to the text:
        fewer than were fed if the text ends among them. With a finish reason the text is over, and nothing is fed any
        more."""
        ...

    def finish(self) -> Delta:
        """End the text, because no more tokens may come: the delta has what was held back, no tokens, and a finish
        reason: "length", unless what was held back ends the text otherwise."""
        ...


OutputFactory = Callable[[OutputSpec], Output]


class TokenOutput:
    """No text, for requests that want tokens alone: a single `EndEvent`, with all of them.

    Raises InvalidRequestError for a stop string that is not the text of a special token."""

    def __init__(self, spec: OutputSpec):
        unknown = set(spec.stop) - {*spec.ends.values()}
        if unknown:
            raise InvalidRequestError(
                f"an output of tokens finds no stop string such as {min(unknown)!r}: give its tokens as stop_token_ids"
            )
        self._ends = spec.ends
        self._min_tokens = spec.min_tokens
        self._tokens: list[int] = []

    def feed(self, token_ids: Sequence[int]) -> Delta:
        for count, token_id in enumerate(token_ids, 1):
            self._tokens.append(token_id)
            if token_id in self._ends and len(self._tokens) >= self._min_tokens:
                end = EndEvent("stop", tuple(self._tokens))
                return Delta((end,), tuple(token_ids[:count]), "stop", self._ends[token_id])
        return Delta((), tuple(token_ids))

    def finish(self) -> Delta:
        return Delta((EndEvent("length", tuple(self._tokens)),), (), "length")


class TextOutput:
    """The text alone, in `TextEvent`s: for completions, and for formats in which everything is visible content."""

    def __init__(self, spec: OutputSpec):
        self._ends = spec.ends
        self._min_tokens = spec.min_tokens
        self._detokenizer = Detokenizer(spec.decoder, spec.prompt_ids, skip_special_tokens=spec.skip_special_tokens)
        self._stops = StopStrings(spec.stop)
        self._has_stops = any(spec.stop)
        self._count = 0  # tokens fed
        self._tokens: list[int] = []  # those since the last event

    def feed(self, token_ids: Sequence[int]) -> Delta:
        """See `Output`. The token that ends the text has no text of its own."""
        if len(token_ids) == 1 and not self._has_stops and not self._tokens and token_ids[0] not in self._ends:
            # What is fed in nearly every step: a token that can't end the text, where none is pending.
            self._count += 1
            text, tokens = self._detokenizer.feed(token_ids[0]), (token_ids[0],)
            if text:
                return Delta((TextEvent(text, tokens),), tokens)
            self._tokens.append(token_ids[0])
            return Delta((), tokens)
        events: list[Any] = []
        for count, token_id in enumerate(token_ids, 1):
            self._count += 1
            self._tokens.append(token_id)
            if token_id in self._ends and self._may_stop:
                stop_string = self._flush(events) or self._ends[token_id]
                return self._end(events, token_ids[:count], "stop", stop_string)
            stop_string = self._show(self._detokenizer.feed(token_id), events)
            if stop_string is not None:
                return self._end(events, token_ids[:count], "stop", stop_string)
        return Delta(tuple(events), tuple(token_ids))

    def finish(self) -> Delta:
        events: list[Any] = []
        stop_string = self._flush(events)
        return self._end(events, (), "length" if stop_string is None else "stop", stop_string)

    @property
    def _may_stop(self) -> bool:
        return self._count >= self._min_tokens

    def _show(self, text: str, events: list[Any]) -> str | None:
        """Emit text, but for what may become a stop string; return the stop string that it completes."""
        shown, stop_string = self._stops.feed(text, may_stop=self._may_stop)
        self._emit(shown, events)
        return stop_string

    def _flush(self, events: list[Any]) -> str | None:
        """Emit what was held back. An unfinished character among it may still complete a stop string."""
        stop_string = self._show(self._detokenizer.finish(), events)
        if stop_string is None:
            self._emit(self._stops.finish(), events)
        return stop_string

    def _emit(self, text: str, events: list[Any]) -> None:
        if text:
            events.append(TextEvent(text, tuple(self._tokens)))
            self._tokens.clear()

    def _end(self, events: list[Any], token_ids: Sequence[int], reason: FinishReason, stop_string: str | None) -> Delta:
        events.append(EndEvent(reason, tuple(self._tokens)))
        return Delta(tuple(events), tuple(token_ids), reason, stop_string)
