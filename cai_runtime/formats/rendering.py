"""From a conversation to the tokens of a prompt, with the checkpoint's own chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from cai_runtime.errors import ConversationError
from cai_runtime.formats.conversation import Conversation, Reasoning
from cai_runtime.formats.history import uses_tools
from cai_runtime.formats.media import lacking
from cai_runtime.formats.probes import ReasoningForm
from cai_runtime.formats.template import chat_template
from cai_runtime.formats.traced_text import TracedText, mask_of, plain


@dataclass(frozen=True)
class Rendered:
    """A prompt.

    opening: its last characters, from the end of the last message on, as the template wrote them: where an answer begins,
    and whether that is inside a thought. tools: how the template was given the conversation's tools; "generic" is text,
    with calls as JSON between `<tool_call>` and `</tool_call>`; None without tools and calls.
    """

    prompt_ids: list[int]
    opening: str = ""
    tools: Literal["native", "generic"] | None = None


def render_conversation(tokenizer: Any, conversation: Conversation, *, generic_tools: bool = False) -> Rendered:
    """The prompt of a conversation.

    With the tool choice "none" the prompt has no tools: the model is not to call one.

    Args:
        tokenizer: transformers' tokenizer of the checkpoint. Not used by other threads meanwhile.
        generic_tools: put tools to the model as text even where its template takes them; for a format that can't read the
            calls which that template teaches.

    Raises:
        ConversationError: see `template.render`; or the model lacks the reasoning that is asked for, or images or audio.
    """
    for part in (part for message in conversation.messages for part in message.media):
        raise lacking(part)  # nothing here would put it into the prompt
    tools = () if conversation.tool_choice == "none" else conversation.tools
    messages = conversation.messages
    has_tools = uses_tools(messages, tools)
    template = chat_template(tokenizer, conversation.template, for_tools=has_tools and not generic_tools)
    asked = conversation.reasoning
    variables = {} if asked == Reasoning() else reasoning_variables(asked, template.forms.reasoning)
    prompt = template.text(messages, tools, variables, generic=generic_tools)
    style: Literal["native", "generic"] | None = None
    if has_tools:
        style = "generic" if generic_tools else template.forms.tools
    return Rendered(template.encode(prompt), opening_of(prompt), style)


def opening_of(prompt: TracedText) -> str:
    """The characters at the end that the template wrote."""
    return plain(prompt)[mask_of(prompt).rfind(b"\x00") + 1 :]


def reasoning_variables(reasoning: Reasoning, form: ReasoningForm) -> dict[str, Any]:
    """The template's variables for what a request asks of the thought.

    Raises:
        ConversationError: the model can't do that; the message says what it can. Or the request contradicts itself.
    """
    enabled, effort = reasoning.enabled, reasoning.effort
    can_think = form.switch is not None or form.always
    if effort is not None:
        # A model that never thinks does what "none" asks for.
        if effort not in form.levels and (effort != "none" or can_think):
            _refuse(form, "reasoning_effort", f"the level {effort!r}")
        if enabled is not None and enabled != (effort != "none"):
            raise ConversationError(
                f"'reasoning_enabled' is {enabled} and 'reasoning_effort' is {effort!r}: give one of them.",
                param="reasoning_effort",
            )
        enabled = effort != "none"
    if enabled and not can_think:
        _refuse(form, "reasoning_enabled", "reasoning")
    if enabled is False and form.switch is None and form.always:
        _refuse(form, "reasoning_enabled", "answers without reasoning")
    if reasoning.max_tokens is not None and not can_think:
        _refuse(form, "reasoning_max_tokens", "reasoning")
    variables: dict[str, Any] = {}
    if form.switch is not None and enabled is not None:
        variables[form.switch] = enabled
    if form.effort is not None and effort not in (None, "none"):
        variables[form.effort] = effort
    return variables


def _refuse(form: ReasoningForm, param: str, what: str) -> NoReturn:
    if form.levels:
        has = f"It has the levels {', '.join(form.levels)} of 'reasoning_effort'"
        has += " and 'reasoning_enabled'." if form.switch else "; it always reasons."
    elif form.always:
        has = "It always reasons, and has no levels."
    else:
        has = "It has no reasoning that can be controlled."
    raise ConversationError(
        f"'{param}': this model's chat template lacks {what}. {has}", param=param, capability="reasoning"
    )
