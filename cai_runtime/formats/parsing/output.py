"""The output of formats whose answers hold more than content: runs a parser over the tokens of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cai_runtime.engine.detokenizer import Detokenizer, StopStrings
from cai_runtime.engine.output import OutputSpec
from cai_runtime.engine.request import Delta, EndEvent, FinishReason
from cai_runtime.formats.parsing.markers import Markers
from cai_runtime.formats.parsing.stream import Item, Parsing, Stream
from cai_runtime.formats.parsing.writer import Stopped, Writer

Parser = Callable[[Stream], Parsing[None]]


class ParsedOutput:
    """See `engine.output.Output`. The events are those of `formats.events`.

    Args:
        spec: of the engine.
        markers: of the format; those that are tokens divide the text.
        parser: makes the parser of one answer, which reads the stream to its end.
        calls: whether the answer may hold calls.
    """

    def __init__(self, spec: OutputSpec, markers: Markers, parser: Parser, *, calls: bool):
        self._spec = spec
        self._marker_tokens = markers.tokens
        self._count = 0  # tokens fed
        self._writer = Writer(StopStrings(spec.stop), lambda: self._may_stop, calls=calls)
        self._stream = Stream(markers, self._writer)
        self._parser = parser(self._stream)
        self._detokenizer = self._new_detokenizer()
        next(self._parser)

    def feed(self, token_ids: Sequence[int]) -> Delta:
        for count, token_id in enumerate(token_ids, 1):
            self._count += 1
            self._writer.tokens.append(token_id)
            try:
                if token_id in self._spec.ends and self._may_stop:
                    self._finish_parser()
                    return self._end(token_ids[:count], "stop", self._spec.ends[token_id])
                if (marker := self._marker_tokens.get(token_id)) is None:
                    self._parse(self._detokenizer.feed(token_id))
                else:
                    self._parse(self._detokenizer.finish())
                    self._detokenizer = self._new_detokenizer()
                    self._parse(marker)
            except Stopped as stopped:
                return self._stopped(token_ids[:count], stopped)
        return Delta(self._taken_events(), tuple(token_ids))

    def finish(self) -> Delta:
        try:
            self._finish_parser()
        except Stopped as stopped:
            return self._stopped((), stopped)
        return self._end((), "length", None)

    @property
    def _may_stop(self) -> bool:
        return self._count >= self._spec.min_tokens

    def _new_detokenizer(self) -> Detokenizer:
        """At the beginning of the answer, and after each marker. The prompt's end shows that it is no text's beginning."""
        spec = self._spec
        return Detokenizer(spec.decoder, spec.prompt_ids, skip_special_tokens=spec.skip_special_tokens)

    def _parse(self, item: Item) -> None:
        if item != "":
            self._stream.push(item)
            next(self._parser, None)

    def _finish_parser(self) -> None:
        self._parse(self._detokenizer.finish())
        self._parse(None)
        self._writer.finish()

    def _stopped(self, token_ids: Sequence[int], stopped: Stopped) -> Delta:
        """A text that a stop string ends was not cut: what would have followed is of no interest."""
        self._stream.unfinished = False
        return self._end(token_ids, "stop", stopped.stop_string)

    def _end(self, token_ids: Sequence[int], reason: FinishReason, stop_string: str | None) -> Delta:
        """A text that ends by a token inside a thought or a call was cut all the same; one with calls asks for them."""
        if reason == "stop" and self._stream.unfinished:
            reason = "length"
        elif reason == "stop" and self._writer.num_calls:
            reason = "tool_calls"
        events = (*self._taken_events(), EndEvent(reason, tuple(self._writer.tokens)))
        return Delta(events, tuple(token_ids), reason, stop_string)

    def _taken_events(self) -> tuple[Any, ...]:
        events = tuple(self._writer.events)
        self._writer.events.clear()
        return events
