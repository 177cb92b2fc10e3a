"""Harmony, gpt-oss' format: an answer is a few messages, each in a channel.

    <|channel|>analysis<|message|>Let me see.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>
    <|start|>assistant<|channel|>final<|message|>It rains in Oslo.<|return|>

analysis is the thought; final, and commentary to nobody, are content; a message with a recipient is a call. There are no
line breaks between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from cai_runtime.formats.conversation import Tool
from cai_runtime.formats.marked import MarkedFormat, Turn
from cai_runtime.formats.parsing.grammar import ANY, Rules, literal
from cai_runtime.formats.parsing.json_call import json_arguments
from cai_runtime.formats.parsing.stream import Parsing, Stream

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
RECIPIENT = "to="
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


class HarmonyFormat(MarkedFormat):
    name = "harmony"
    openers: tuple[str, ...] = (START, CHANNEL)
    inner = (CONSTRAIN, MESSAGE, *ENDS)
    always_parsed = True

    def is_thinking(self, opening: str) -> bool:
        return False  # a prompt ends before the channel

    def thought_tokens(self) -> tuple[tuple[int, ...], int | None]:
        begin = self._tokenizer(f"{CHANNEL}analysis{MESSAGE}", add_special_tokens=False)["input_ids"]
        return tuple(begin), self.markers.token("<|end|>").token_id

    def thought_ends(self, turn: Turn) -> tuple[str, ...]:
        return (*ENDS, *self.openers)

    def parse(self, turn: Turn, stream: Stream) -> Parsing[None]:
        while not stream.ended:
            # A recipient may come before the channel. What is in no message is content.
            marker = yield from stream.begins((RECIPIENT,))
            marker = marker or (yield from stream.content(*self.openers, *ENDS))
            if marker in (RECIPIENT, *self.openers):
                yield from self._message(turn, stream, marker)

    def _message(self, turn: Turn, stream: Stream, header: str) -> Parsing[None]:
        """One message, of whose header the first marker was read. A header that does not end is content, as written."""
        pieces = [header]
        if (yield from stream.until((MESSAGE,), pieces.append)) is None:
            stream.unfinished = True
            stream.writer.content("".join(pieces))
            return
        header = "".join(pieces)
        channels, recipient = _CHANNEL.findall(header), _RECIPIENT.search(header)
        if recipient is not None and turn.may_call:
            yield from stream.calls("", self._call(stream, recipient[1].removeprefix("functions.")), ENDS)
        elif channels and channels[-1] == "analysis":
            stream.writer.marker()
            end = yield from stream.thought(*self.thought_ends(turn))
            if end in self.openers:  # the end was left out
                stream.unread(self.markers.token(end))
        else:
            stream.writer.boundary()
            stream.writer.marker()
            stream.writer.separate()  # the outer loop reads it as content

    def _call(self, stream: Stream, name: str) -> Parsing[None]:
        yield from json_arguments(stream, name)
        stream.end_call()

    def thought_rule(self, rules: Rules, turn: Turn) -> str:
        return (
            f"({self._head(rules, 'analysis')} {rules.until('<|end|>')} {rules.marker(START)} {literal('assistant')})?"
        )

    def call_rule(self, rules: Rules, tool: Tool, arguments: str) -> str:
        """It ends with <|call|>, which ends the text."""
        to = literal(f"commentary to=functions.{tool.name} ")
        head = f"{rules.marker(CHANNEL)} {to} {rules.marker(CONSTRAIN)} {literal('json')} {rules.marker(MESSAGE)}"
        return f"{head} {arguments}"

    def calls_rule(self, rules: Rules, call: str, several: bool) -> str:
        return call

    def answer_rule(self, rules: Rules, answer: str) -> str:
        return f"{self._head(rules, 'final')} {answer}"

    def free_rule(self, rules: Rules, call: str, arguments: Mapping[str, str], several: bool) -> str:
        preamble = (
            f"{self._head(rules, 'commentary')} {rules.until('<|end|>')} {rules.marker(START)} {literal('assistant')}"
        )
        return f"{self._head(rules, 'final')} ({ANY})? | ({preamble})? {call}"

    def _head(self, rules: Rules, channel: str) -> str:
        return f"{rules.marker(CHANNEL)} {literal(channel)} {rules.marker(MESSAGE)}"
