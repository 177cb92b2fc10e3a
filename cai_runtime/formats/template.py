"""Renders a conversation to token ids with the checkpoint's own chat template.

The template runs in a sandbox (`sandbox`): it comes with the checkpoint, and that from anywhere. The prompt keeps apart
what the template wrote and what callers wrote (`traced_text`), so that content never becomes a control token
(`control_tokens`).
"""

from __future__ import annotations

import contextlib
import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import ConversationError
from cai_runtime.formats.history import declared, in_words, turns_of, uses_tools
from cai_runtime.formats.messages import Message
from cai_runtime.formats.probes import TemplateForms
from cai_runtime.formats.program import TemplateProgram
from cai_runtime.formats.traced_text import TracedText

if TYPE_CHECKING:
    from cai_runtime.formats.control_tokens import PromptEncoder
    from cai_runtime.formats.conversation import Tool

DEFAULT = "default"
FOR_TOOLS = "tool_use"  # of several templates, the one for conversations with tools, by transformers' convention

_made: weakref.WeakKeyDictionary[Any, tuple[Any, dict[str, ChatTemplate]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # guards _made


def template_text(tokenizer: Any) -> str:
    """The source of the checkpoint's chat templates; "" if it has none."""
    stored = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(map(str, stored.values())) if isinstance(stored, Mapping) else str(stored)


def has_template(tokenizer: Any) -> bool:
    """Whether the checkpoint came with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_of(checkpoint: Path) -> tuple[Any, dict[str, str]]:
    """A checkpoint's chat template, or its templates by name, and its special tokens, without loading its tokenizer. None
    and no tokens if it has none, or its files can't be read."""
    config: Any = _json(checkpoint / "tokenizer_config.json")
    config = config if isinstance(config, dict) else {}
    stored = config.get("chat_template")
    if isinstance(stored, list):  # as transformers writes several
        stored = {one.get("name"): one.get("template") for one in stored if isinstance(one, dict)}
    legacy = _json(checkpoint / "chat_template.json")
    if isinstance(legacy, dict) and legacy.get("chat_template"):
        stored = legacy["chat_template"]
    with contextlib.suppress(OSError, ValueError):
        stored = (checkpoint / "chat_template.jinja").read_text("utf-8")
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    return stored, {key: value for key, value in tokens.items() if key.endswith("_token") and isinstance(value, str)}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def render(tokenizer: Any, messages: Sequence[Message], name: str | None = None) -> list[int]:
    """Token ids of the conversation, ending where the assistant's answer begins.

    Args:
        tokenizer: transformers' tokenizer of the checkpoint. Not used by other threads meanwhile.
        messages: the conversation, oldest first.
        name: of the chat template, where the checkpoint has several. Default: the one named "default", or the only one.

    Raises:
        ConversationError: there is no template, or none of this name; the template refuses this conversation or fails
            (its own words are quoted); or content can't be tokenized as text.
    """
    return chat_template(tokenizer, name).render(messages)


def chat_template(tokenizer: Any, name: str | None = None, *, for_tools: bool = False) -> ChatTemplate:
    """The tokenizer's chat template, made at its first use. Arguments and errors as those of `render`.

    for_tools: whether the conversation has tools or calls, for which a checkpoint may have a template of its own. One that
    can't take them is passed over for the default one, to which they are put as text.
    """
    stored = getattr(tokenizer, "chat_template", None)
    with _lock:
        known = _made.get(tokenizer)
        if known is None or known[0] != stored:
            known = _made[tokenizer] = (stored, {})
    if name is None and for_tools and isinstance(stored, Mapping) and FOR_TOOLS in stored:
        found = chat_template(tokenizer, FOR_TOOLS)
        if found.forms.tools == "native" or DEFAULT not in stored:
            return found
    chosen = _choose(stored, name)
    if chosen not in known[1]:
        sources: Mapping[str, Any] = stored if isinstance(stored, Mapping) else {DEFAULT: stored}
        # By a weak reference: a tokenizer lives no longer for having been used.
        known[1][chosen] = ChatTemplate(weakref.proxy(tokenizer), sources[chosen], chosen)
    return known[1][chosen]


def _choose(stored: Any, name: str | None) -> str:
    """The name of the template to use."""
    if not stored:
        raise ConversationError(
            "This checkpoint has no chat template, so it can't chat: use completions, or put a chat_template.jinja "
            "beside its tokenizer.",
            param="model",
            capability="chat",
        )
    names = sorted(stored) if isinstance(stored, Mapping) else [DEFAULT]
    if name is None:
        if DEFAULT in names:
            return DEFAULT
        if len(names) == 1:
            return names[0]
        raise ConversationError(
            f"This model has several chat templates and none is the default: name one of {', '.join(names)} with "
            "'chat_template'.",
            param="chat_template",
        )
    if name not in names:
        raise ConversationError(
            f"This model has no chat template named {name!r}: 'chat_template' must be one of {', '.join(names)}.",
            param="chat_template",
        )
    return name


class ChatTemplate:
    """One chat template and the tokenizer it writes for. Compiled, and asked what it takes, once.

    Args:
        tokenizer: transformers' tokenizer; its special tokens are the template's variables.
        source: the template, Jinja.
        name: for errors.

    Raises:
        ConversationError: the source is no Jinja template.
    """

    def __init__(self, tokenizer: Any, source: str, name: str = DEFAULT):
        from cai_runtime.formats.control_tokens import PromptEncoder

        self.name = name
        self.program = TemplateProgram(source, name, tokenizer.special_tokens_map)
        self.forms = TemplateForms(self.program)
        self._encoder: PromptEncoder = PromptEncoder(tokenizer, self.program.literals)

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation. See the function `render`."""
        return self.encode(self.text(messages))

    def encode(self, prompt: TracedText) -> list[int]:
        """Token ids of a prompt's text."""
        return self._encoder.encode(prompt)

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] | None = None,
        *,
        generic: bool = False,
    ) -> TracedText:
        """The prompt's characters, and which of them the template wrote.

        Args:
            tools: those that the model may call.
            variables: of the template, beyond those that every template has.
            generic: put tools, calls and results to the model as text, whatever the template takes.

        Raises:
            ConversationError: the template refuses the conversation or fails; its own words are quoted.
        """
        from cai_runtime.formats.sandbox import TEMPLATE_ERRORS

        declarations: Sequence[Any] | None = self.forms.no_tools
        if uses_tools(messages, tools):
            if generic or self.forms.tools == "generic":
                messages = in_words(messages, tools, system=self.forms.system)
            elif tools:
                declarations = declared(tools, whole=self.forms.whole_tools)
                if self.forms.tools_need_system and not any(m.role in ("system", "developer") for m in messages):
                    messages = [Message("system", ""), *messages]
        turns = turns_of(messages, self.forms.turns)
        try:
            return self.program.run(turns, declarations, **(variables or {}))
        except TEMPLATE_ERRORS as error:
            raise self.program.failure("refuses these messages", error) from error
