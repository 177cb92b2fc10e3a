"""What formats share whose answers are a thought, content, and calls between markers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

from cai_runtime.engine.output import OutputFactory, TextOutput
from cai_runtime.errors import ConversationError
from cai_runtime.formats.base import Capabilities
from cai_runtime.formats.budget import ThoughtBudget
from cai_runtime.formats.conversation import Conversation, Prepared, Tool
from cai_runtime.formats.parsing.grammar import ANY, OBJECT, Rules, answer_grammar, enforced, literal, object_schema
from cai_runtime.formats.parsing.markers import Markers
from cai_runtime.formats.parsing.output import ParsedOutput
from cai_runtime.formats.parsing.stream import Parsing, Stream
from cai_runtime.formats.rendering import render_conversation
from cai_runtime.formats.template import chat_template, template_text

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

    @property
    def content_is_bound(self) -> bool:
        """Whether the answer is either calls or what the request says content must be. Then an object that no opener
        announces may be content, though it looks like a call."""
        return self.conversation.answer is not None and self.conversation.tool_choice == "auto"


class MarkedFormat:
    """See `base.Format`. An answer may begin with a thought; then content and calls alternate. A call begins with one of
    `openers` and ends with one of `closers`.

    tokenizer: transformers' tokenizer of the checkpoint.
    """

    name: str
    openers: tuple[str, ...] = ()  # in the order of preference; grammars write the first
    closers: ClassVar[tuple[str, ...]] = ()
    generic_kind: ClassVar[type[MarkedFormat]]  # `hermes.GenericFormat`, which enters itself here
    separator: ClassVar[str] = "\n"  # between two calls
    inner: ClassVar[tuple[str, ...]] = ()  # other markers that may be tokens
    has_calls: ClassVar[bool] = True
    native_tools: ClassVar[bool] = True  # the template takes tools
    always_parsed: ClassVar[bool] = False  # its answers have markers even without thoughts and calls
    opened_by_tokens: ClassVar[bool] = False  # openers that are no tokens of the tokenizer are none

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        text = template_text(tokenizer)
        known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        # The marker of a thought's end tells: templates that end the prompt inside a thought write no other one.
        self.thought = next((pair for pair in THOUGHTS if pair[1] in text or set(pair) <= known), None)
        self.markers = Markers(tokenizer, (*self.openers, *self.closers, *self.inner, *(self.thought or ())))
        if self.opened_by_tokens:
            self.openers = tuple(filter(self.markers.is_token, self.openers))

    @cached_property
    def capabilities(self) -> Capabilities:
        """What the model's template offers. Hold the tokenizer's lock. Raises ConversationError without a template."""
        forms = chat_template(self._tokenizer, for_tools=True).forms
        tools = (forms.tools if self.native_tools else "generic") if self.has_calls else None
        form = forms.reasoning
        return Capabilities(
            tools=tools,
            parallel=tools == "generic" or (tools is not None and forms.turns.calls.parallel),
            reasoning=self.thought is not None or form.always or form.switch is not None,
            switch=form.switch,
            efforts=form.levels,
        )

    def prepare(self, conversation: Conversation) -> Prepared:
        if conversation.tools and conversation.tool_choice != "none" and not self.has_calls:
            raise ConversationError(
                f"The conversation format {self.name} has no tool calls: leave 'tools' out, or name another format with "
                "Client(format=...).",
                param="tools",
                capability="tools",
            )
        rendered = render_conversation(self._tokenizer, conversation, generic_tools=not self.native_tools)
        reader = self if rendered.tools != "generic" else self.generic()
        turn = Turn(conversation, self.is_thinking(rendered.opening))
        budget = self.budget(turn)
        return Prepared(rendered.prompt_ids, reader.output(turn), answer_grammar(reader, turn), budget)

    def budget(self, turn: Turn) -> ThoughtBudget | None:
        """What closes the thought in time, where the request says when.

        Raises:
            ConversationError: thoughts don't end with a token of their own, which could be forced.
        """
        tokens = turn.conversation.reasoning.max_tokens
        if tokens is None:
            return None
        begin, end = self.thought_tokens()
        if end is None:
            raise ConversationError(
                f"'reasoning_max_tokens': the conversation format {self.name} has no token that ends this model's thoughts.",
                param="reasoning_max_tokens",
                capability="reasoning",
            )
        others = (self.markers.token(text).token_id for text in self.thought_ends(turn))
        return ThoughtBudget(tokens, begin, end, frozenset(i for i in others if i is not None), turn.thinks)

    def thought_ends(self, turn: Turn) -> tuple[str, ...]:
        """What ends a thought besides its own marker: a call's opener that is a token."""
        return tuple(filter(self.markers.is_token, self.openers)) if turn.may_call else ()

    def thought_tokens(self) -> tuple[tuple[int, ...], int | None]:
        """The tokens that begin a thought, and the one that ends it; None: there is none."""
        begin, end = (self.markers.token(text).token_id for text in self.thought) if self.thought else (None, None)
        return () if begin is None else (begin,), end

    def generic(self) -> MarkedFormat:
        """The format of calls where the template shows no tools, so that they were put to the model as text."""
        return self.generic_kind(self._tokenizer)

    def is_thinking(self, opening: str) -> bool:
        """Whether a prompt that ends like this has opened a thought."""
        if self.thought is None:
            return False
        begin, end = self.thought
        return opening.rfind(begin) > opening.rfind(end)

    def output(self, turn: Turn) -> OutputFactory:
        if self.thought is None and not turn.may_call and not self.always_parsed:
            return TextOutput
        return partial(ParsedOutput, markers=self.markers, parser=partial(self.parse, turn), calls=turn.may_call)

    # -- what an answer is ---------------------------------------------------------------------------------------------

    def parse(self, turn: Turn, stream: Stream) -> Parsing[None]:
        """Read one answer to its end."""
        openers = self.openers if turn.may_call else ()
        opener = None
        if turn.thinks:
            opener = yield from self.read_thought(turn, stream)
        while not stream.ended:
            if opener is None and self.thought is not None and (yield from stream.begins(self.thought[:1])):
                stream.writer.marker()
                opener = yield from self.read_thought(turn, stream)
            if opener is None and turn.may_call:
                yield from self.bare_calls(turn, stream)
            opener = opener or (yield from stream.content(*openers))
            if opener is not None:
                yield from stream.calls(opener, self.call(turn, stream, opener), self.closers)
                opener = None

    def read_thought(self, turn: Turn, stream: Stream) -> Parsing[str | None]:
        """Read a thought to its end. A call's opener that ends it is returned."""
        assert self.thought is not None
        end = yield from stream.thought(self.thought[1], *self.thought_ends(turn))
        return None if end == self.thought[1] else end

    def bare_calls(self, turn: Turn, stream: Stream) -> Parsing[None]:
        """Read calls that no opener announces, where the format has them. Called where content would begin."""
        yield from ()

    def call(self, turn: Turn, stream: Stream, opener: str) -> Parsing[None]:
        """Read what follows an opener: see `Stream.calls`."""
        raise NotImplementedError

    # -- what an answer that is held to a grammar is: expressions of `parsing.grammar` ---------------------------------

    def call_rule(self, rules: Rules, tool: Tool, arguments: str) -> str:
        """One call, from what follows its opener to its closer."""
        raise NotImplementedError

    def calls_rule(self, rules: Rules, call: str, several: bool) -> str:
        """One call or several, and nothing else."""
        opened = f"{rules.marker(self.openers[0])} {call}"
        return f"{opened} ({literal(self.separator)} {opened})*" if several else opened

    def free_rule(self, rules: Rules, call: str, arguments: Mapping[str, str], several: bool) -> str:
        """Content with or without calls; a call is what comes after an opener. arguments: the functions' rules, by name."""
        if not several:
            return self.led_rule(rules, call)
        opener = self.openers[0]
        if self.markers.is_token(opener):
            return f"({ANY})? ({rules.marker(opener)} {call} ({ANY})?)*"
        return f"({rules.until(opener)} {call})* ({ANY})?"

    def led_rule(self, rules: Rules, rest: str) -> str:
        """Content, which an opener and what follows it may end."""
        opener = self.openers[0]
        if self.markers.is_token(opener):
            return f"({ANY})? ({rules.marker(opener)} {rest})?"
        return f"{rules.until(opener)} {rest} | ({ANY})?"

    def arguments_rule(self, rules: Rules, tool: Tool, place: str) -> str:
        """A function's arguments, held to its schema. Raises ConversationError where they can't be."""
        return rules.add("arguments", enforced(object_schema(tool), place))

    def any_arguments_rule(self, rules: Rules, tool: Tool) -> str:
        """A function's arguments, whatever they are."""
        return rules.add("any_arguments", enforced(OBJECT, "tools"))

    def answer_rule(self, rules: Rules, answer: str) -> str:
        """Content alone."""
        return answer

    def thought_rule(self, rules: Rules, turn: Turn) -> str:
        """The thought before: needed where the prompt has opened it, else as the model likes."""
        if self.thought is None or (turn.conversation.reasoning.off and not turn.thinks):
            return ""
        begin, end = self.thought
        rest = f"{rules.until(end)} (/\\n{{1,2}}/)?"
        return rest if turn.thinks else f"({rules.marker(begin)} {rest})?"
