"""A chat template, compiled: runs on turns that have the shape it takes, and gives text with provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cai_runtime.errors import ConversationError
from cai_runtime.formats.traced_text import TracedText, joined, own

MAX_QUOTED = 500  # characters of a template's own words in an error


class TemplateProgram:
    """One chat template. Needs no tokenizer.

    Args:
        source: the template, Jinja.
        name: for errors.
        special_tokens: name to spelling, as transformers' `special_tokens_map`: variables of the template.

    Raises:
        ConversationError: the source is no Jinja template.
    """

    def __init__(self, source: str, name: str, special_tokens: Mapping[str, Any]):
        from jinja2 import nodes

        from cai_runtime.formats.sandbox import TEMPLATE_ERRORS, ChatTemplateEnvironment, literals

        self.name = name
        environment = ChatTemplateEnvironment()
        try:
            self._compiled = environment.from_string(source)
            self.literals: str = literals(environment, source)  # all constant text
            # The variables that it reads, its own included.
            self.reads = frozenset(found.name for found in environment.parse(source).find_all(nodes.Name))
        except TEMPLATE_ERRORS as error:
            raise self.failure("can't be compiled", error) from error
        self._variables = {
            key: [own(str(token)) for token in value] if isinstance(value, (list, tuple)) else own(str(value))
            for key, value in special_tokens.items()
        }

    def run(self, turns: Sequence[Mapping[str, Any]], tools: Any = None, **variables: Any) -> TracedText:
        """The prompt, to where the answer begins. Raises what a template can raise: `sandbox.TEMPLATE_ERRORS`."""
        from cai_runtime.formats.sandbox import budgeted_range

        prompt = self._compiled.render(
            **self._variables,
            messages=turns,
            tools=tools,
            documents=None,
            add_generation_prompt=True,
            range=budgeted_range(),
            **variables,
        )
        return joined((prompt,))

    def attempt(self, turns: Sequence[Mapping[str, Any]], tools: Any = None, **variables: Any) -> str | None:
        """The same as a plain text; None if the template fails."""
        from cai_runtime.formats.sandbox import TEMPLATE_ERRORS
        from cai_runtime.formats.traced_text import plain

        try:
            return plain(self.run(turns, tools, **variables))
        except TEMPLATE_ERRORS:
            return None

    def failure(self, what: str, error: Exception) -> ConversationError:
        """The error of a template that failed, in its own words."""
        words = f"{type(error).__name__}: {error}" if type(error).__module__ == "builtins" else str(error)
        if len(words) > MAX_QUOTED:
            words = words[: MAX_QUOTED - 3] + "..."
        return ConversationError(f"The model's chat template ({self.name}) {what}: {words}")
