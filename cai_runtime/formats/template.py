"""Renders a conversation to token ids with the checkpoint's own chat template.

The template runs in a sandbox (`sandbox`): it comes with the checkpoint, and that from anywhere. The prompt keeps apart
what the template wrote and what callers wrote (`traced_text`), so that content never becomes a control token
(`control_tokens`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import ConversationError
from cai_runtime.formats.messages import ROLES, ContentForm, Message
from cai_runtime.formats.traced_text import TracedText, joined, own, plain

if TYPE_CHECKING:
    from cai_runtime.formats.control_tokens import PromptEncoder

DEFAULT = "default"
MAX_QUOTED = 500  # characters of a template's own words in an error
PROBE_WORDS = ("cabbage", "lettuce")  # looked for in a rendered prompt, to see which kind of content came through
PROBES: dict[ContentForm, str | tuple[str, ...]] = {"text": " ".join(PROBE_WORDS), "parts": PROBE_WORDS}

_made: weakref.WeakKeyDictionary[Any, tuple[Any, dict[str, ChatTemplate]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # guards _made


def has_template(tokenizer: Any) -> bool:
    """Whether the checkpoint came with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


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


def chat_template(tokenizer: Any, name: str | None = None) -> ChatTemplate:
    """The tokenizer's chat template, made at its first use. Arguments and errors as those of `render`."""
    stored = getattr(tokenizer, "chat_template", None)
    with _lock:
        known = _made.get(tokenizer)
        if known is None or known[0] != stored:
            known = _made[tokenizer] = (stored, {})
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
    """One chat template and the tokenizer it writes for. Compiled, and asked what content it takes, once.

    Args:
        tokenizer: transformers' tokenizer; its special tokens are the template's variables.
        source: the template, Jinja.
        name: for errors.

    Raises:
        ConversationError: the source is no Jinja template.
    """

    def __init__(self, tokenizer: Any, source: str, name: str = DEFAULT):
        from cai_runtime.formats.control_tokens import PromptEncoder
        from cai_runtime.formats.sandbox import TEMPLATE_ERRORS, ChatTemplateEnvironment, literals

        self.name = name
        environment = ChatTemplateEnvironment()
        try:
            self._compiled = environment.from_string(source)
            text = literals(environment, source)
        except TEMPLATE_ERRORS as error:
            raise self._failure("can't be compiled", error) from error
        self._variables = {
            key: [own(str(token)) for token in value] if isinstance(value, (list, tuple)) else own(str(value))
            for key, value in tokenizer.special_tokens_map.items()
        }
        self._encoder: PromptEncoder = PromptEncoder(tokenizer, text)
        self.content_forms: dict[str, ContentForm] = dict.fromkeys(ROLES, "text")
        for role in ("user", "system", "assistant"):  # user turns first: they surround the others
            self.content_forms[role] = self._probe(role)

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation. See the function `render`."""
        return self._encoder.encode(self.text(messages))

    def text(self, messages: Sequence[Message]) -> TracedText:
        """The prompt's characters, and which of them the template wrote."""
        from cai_runtime.formats.sandbox import TEMPLATE_ERRORS

        turns = [message.for_template(self.content_forms[message.role]) for message in messages]
        try:
            return self._run(turns)
        except TEMPLATE_ERRORS as error:
            raise self._failure("refuses these messages", error) from error

    def _run(self, turns: list[dict[str, Any]]) -> TracedText:
        from cai_runtime.formats.sandbox import budgeted_range

        prompt = self._compiled.render(
            **self._variables,
            messages=turns,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            range=budgeted_range(),
        )
        return joined((prompt,))

    def _probe(self, role: str) -> ContentForm:
        """Which kind of content the template takes for a role: it is rendered with each, and the text looked for."""
        from cai_runtime.formats.sandbox import TEMPLATE_ERRORS

        hello = Message("user", "Hello")
        taken: list[ContentForm] = []
        for form, content in PROBES.items():
            asked = Message(role, content)
            conversation = {"system": [asked, hello], "user": [asked], "assistant": [hello, asked, hello]}[role]
            turns = [m.for_template(form if m is asked else self.content_forms["user"]) for m in conversation]
            try:
                text = plain(self._run(turns))
            except TEMPLATE_ERRORS:  # this form of content is not taken
                continue
            # A template that prints the list holds the texts too, inside Python's or JSON's spelling of it.
            if all(word in text for word in PROBE_WORDS) and not ("'type'" in text or '"type"' in text):
                taken.append(form)
        if len(taken) == 2:
            return "both"
        return taken[0] if taken else "text"

    def _failure(self, what: str, error: Exception) -> ConversationError:
        words = f"{type(error).__name__}: {error}" if type(error).__module__ == "builtins" else str(error)
        if len(words) > MAX_QUOTED:
            words = words[: MAX_QUOTED - 3] + "..."
        return ConversationError(f"The model's chat template ({self.name}) {what}: {words}")
