"""A conversation format whose answers are known: the alphabet's tokens stand for whatever events a test wants."""

from collections import deque
from dataclasses import replace

import pytest

from cai_runtime.engine.request import Delta
from cai_runtime.formats.conversation import Prepared, Reasoning
from cai_runtime.formats.events import EndEvent, MarkerEvent, ToolCallEvent
from cai_runtime.formats.rendering import render_conversation


class ScriptedOutput:
    """Makes the next event of a script of each token, and ends with its last."""

    def __init__(self, script):
        self._script = deque(script)

    def feed(self, token_ids):
        events = []
        for count, token_id in enumerate(token_ids, 1):
            event = self._script.popleft()
            events.append(type(event)(*[getattr(event, name) for name in fields(event)], (token_id,)))
            if isinstance(event, EndEvent):
                return Delta(tuple(events), tuple(token_ids[:count]), event.finish_reason)
        return Delta(tuple(events), tuple(token_ids))

    def finish(self):
        return Delta((EndEvent("length"),), (), "length")


def fields(event):
    names = {MarkerEvent: (), EndEvent: ("finish_reason",), ToolCallEvent: ("index", "call_id", "name")}
    return names.get(type(event), ("index", "text") if hasattr(event, "index") else ("text",))


class ScriptedFormat:
    """Renders as the plain format does, and answers with the next script; keeps the conversations."""

    name = "scripted"

    def __init__(self, tokenizer, scripts):
        self._tokenizer = tokenizer
        self._scripts = deque(scripts)
        self.conversations = []

    def prepare(self, conversation):
        self.conversations.append(conversation)
        # The template has no switch for thoughts.
        rendered = render_conversation(self._tokenizer, replace(conversation, reasoning=Reasoning()))
        script = self._scripts.popleft()
        return Prepared(rendered.prompt_ids, lambda spec: ScriptedOutput(script))


TEMPLATE = """
{%- for m in messages %}
{{- m.role + ':' + (m.content or '') }}
{%- if m.reasoning_content %}{{ '(' + m.reasoning_content + ')' }}{% endif %}
{%- for c in m.tool_calls or [] %}{{ '[' + c.function.name + ' ' + (c.function.arguments | tojson) + ']' }}{% endfor %}
{{- '\\n' }}
{%- endfor %}
{%- for tool in tools or [] %}{{ 'tool ' + (tool | tojson) + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}
"""


@pytest.fixture
def scripted(client, factory, tokenizer):
    """scripted(script, ...) -> the ScriptedFormat that the client's model now has. A script: the events of an answer."""

    def script(*scripts):
        tokenizer.chat_template = TEMPLATE
        factory.prepare = lambda runner: setattr(runner, "max_context", 1000)
        opened = client._host.open(client._host.resolve("abc"))
        opened.format = ScriptedFormat(opened.tokenizer, scripts)
        return opened.format

    return script


@pytest.fixture
def prompts(factory):
    """prompts() -> the prompts that the engine was given, as text, since the last call."""
    seen = []

    def read():
        (engine,) = factory.engines
        if not seen:
            submit_all = engine.submit_all

            def submit(requests):
                seen.extend(engine.tokenizer.decode(request.prompt_ids) for request in requests)
                return submit_all(requests)

            engine.submit_all = submit
        taken = [*seen]
        seen.clear()
        return taken

    return read
