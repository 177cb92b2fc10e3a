"""What formats share whose answers are a thought, content, and calls between markers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

from cai_runtime.engine.output import OutputFactory, TextOutput
from cai_runtime.errors import ConversationError
from cai_runtime.formats.base import Capabilities
from cai_runtime.formats.conversation import Conversation, Prepared, Tool
from cai_runtime.formats.parsing.markers import Markers
from cai_runtime.formats.parsing.output import ParsedOutput
from cai_runtime.formats.parsing.stream import Parsing, Stream
from cai_runtime.formats.rendering import render_conversation
from cai_runtime.formats.switches import capabilities_of, template_text

THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True)
class Turn:
    """One answer to come. thinks: the prompt has opened a thought."""

    conversation: Conversation
    thinks: bool = False

    @cached_property
    def tools(self) -> dict[str, Tool]:
        return {tool.name: tool for tool in self.conversation.tools}

    @property
    def may_call(self) -> bool:
        """Where it may not, what looks like a call is content."""
        return bool(self.conversation.tools) and self.conversation.tool_choice != "none"


class MarkedFormat:
    """See `base.Format`. An answer may begin with a thought; then content and calls alternate. A call begins with one of
    `openers` and ends with one of `closers`.

    tokenizer: transformers' tokenizer of the checkpoint.
    """

    name: ClassVar[str]
    openers: ClassVar[tuple[str, ...]] = ()
    closers: ClassVar[tuple[str, ...]] = ()
    inner: ClassVar[tuple[str, ...]] = ()  # other markers that may be tokens
    native_tools: ClassVar[bool] = True  # the template takes tools

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        text = template_text(tokenizer)
        known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        # The marker of a thought's end tells: templates that end the prompt inside a thought write no other one.
        self.thought = next((pair for pair in THOUGHTS if pair[1] in text or set(pair) <= known), None)
        self.markers = Markers(tokenizer, (*self.openers, *self.closers, *self.inner, *(self.thought or ())))

    @cached_property
    def capabilities(self) -> Capabilities:
        """What the model's template offers. Hold the tokenizer's lock."""
        return capabilities_of(self._tokenizer, bool(self.openers), self.native_tools, self.thought is not None)

    def prepare(self, conversation: Conversation) -> Prepared:
        if conversation.tools and conversation.tool_choice != "none" and not self.openers:
            raise ConversationError(
                f"The conversation format {self.name} has no tool calls: leave 'tools' out, or name another format with "
                "Client(format=...).",
                param="tools",
                capability="tools",
            )
        rendered = render_conversation(self._tokenizer, conversation)
        turn = Turn(conversation, self.is_thinking(rendered.opening))
        return Prepared(rendered.prompt_ids, self.output(turn), self.grammar(turn))

    def is_thinking(self, opening: str) -> bool:
        """Whether a prompt that ends like this has opened a thought."""
        if self.thought is None:
            return False
        begin, end = self.thought
        return opening.rfind(begin) > opening.rfind(end)

    def output(self, turn: Turn) -> OutputFactory:
        if self.thought is None and not turn.may_call:
            return TextOutput
        return partial(ParsedOutput, markers=self.markers, parser=partial(self.parse, turn), calls=turn.may_call)

    def grammar(self, turn: Turn) -> str | None:
        from cai_runtime.formats.parsing.grammar import answer_grammar

        return answer_grammar(self, turn)

    # -- what an answer is ---------------------------------------------------------------------------------------------

    def parse(self, turn: Turn, stream: Stream) -> Parsing[None]:
        """Read one answer to its end."""
        openers = self.openers if turn.may_call else ()
        opener = None
        if turn.thinks:
            opener = yield from self.read_thought(stream, openers)
        while not stream.ended:
            if opener is None and self.thought is not None and (yield from stream.begins(self.thought[:1])):
                opener = yield from self.read_thought(stream, openers)
            if opener is None and turn.may_call:
                yield from self.bare_calls(turn, stream)
            opener = opener or (yield from stream.content(*openers))
            if opener is not None:
                yield from stream.calls(opener, self.call(turn, stream, opener), self.closers)
                opener = None

    def read_thought(self, stream: Stream, openers: Iterable[str]) -> Parsing[str | None]:
        """Read a thought to its end. A call's opener that is a token ends it, too, and is returned."""
        assert self.thought is not None
        end = yield from stream.thought(self.thought[1], *filter(self.markers.is_token, openers))
        return None if end == self.thought[1] else end

    def bare_calls(self, turn: Turn, stream: Stream) -> Parsing[None]:
        """Read calls that no opener announces, where the format has them. Called where content would begin."""
        yield from ()

    def call(self, turn: Turn, stream: Stream, opener: str) -> Parsing[None]:
        """Read what follows an opener: see `Stream.calls`."""
        raise NotImplementedError
