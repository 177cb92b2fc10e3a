"""What a request asks of a conversation format, and what the format makes of it for the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cai_runtime.engine.output import OutputFactory
from cai_runtime.formats.budget import ThoughtBudget
from cai_runtime.formats.messages import Message


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. parameters: the JSON schema of its arguments, an object's. strict: arguments
    are held to it by constrained decoding."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


@dataclass(frozen=True)
class Reasoning:
    """enabled, effort: None is what the template does by itself. max_tokens: of the thought, which is closed then."""

    enabled: bool | None = None
    effort: str | None = None  # none, low, medium, high, xhigh, max
    max_tokens: int | None = None

    @property
    def off(self) -> bool:
        """Whether the answer is to have no thought."""
        return self.enabled is False or self.effort == "none"


@dataclass(frozen=True)
class Answer:
    """What the visible content must be. expression: of llguidance's dialect of Lark, such as `%json {...}` or `/[0-9]+/`,
    to be put into a rule."""

    expression: str


@dataclass(frozen=True)
class Conversation:
    """A checked request, in no endpoint's terms.

    tool_choice: "auto", "none", "required", or the function that must be called. answer: None is any text.
    template: the name of one of the model's chat templates.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: Literal["auto", "none", "required"] | Tool = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning = Reasoning()
    answer: Answer | None = None
    template: str | None = None


@dataclass(frozen=True)
class Prepared:
    """prompt_ids: ends where the answer begins. output: makes events of `formats.events`. grammar: what the whole
    generated text must be, its markers included, in llguidance's dialect of Lark with `start`; None: anything. budget:
    closes the thought in time, where the request says when."""

    prompt_ids: list[int]
    output: OutputFactory
    grammar: str | None = None
    budget: ThoughtBudget | None = None
