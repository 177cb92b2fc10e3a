"""Which format a checkpoint gets."""

import json

import pytest

from cai_runtime.errors import ConversationError, OptionValueError
from cai_runtime.formats.conversation import Conversation, Tool
from cai_runtime.formats.find import FORMATS, find_format, tools_of
from cai_runtime.formats.messages import Message


def test_the_named_format_wins(make_byte_tokenizer):
    for name in FORMATS:
        assert find_format(make_byte_tokenizer(), name=name).name == name


def test_an_unknown_name_is_refused(make_byte_tokenizer):
    with pytest.raises(OptionValueError, match="'hermess'.*plain, generic, harmony.*hermes"):
        find_format(make_byte_tokenizer(), name="hermess")


def test_a_template_without_tools_gets_the_generic_format(make_byte_tokenizer):
    tokenizer = make_byte_tokenizer(tags=False)
    found = find_format(tokenizer)
    assert (found.name, found.capabilities.tools) == ("generic", "generic")
    tools = (Tool("get_time", "The time."),)
    prepared = found.prepare(Conversation((Message("user", "Hello"),), tools=tools))
    assert "get_time" in tokenizer.decode(prepared.prompt_ids)


def test_plain_refuses_tools(make_byte_tokenizer):
    plain = find_format(make_byte_tokenizer(), name="plain")
    with pytest.raises(ConversationError) as error:
        plain.prepare(Conversation((Message("user", "Hello"),), tools=(Tool("get_time"),)))
    assert (error.value.param, error.value.capability) == ("tools", "tools")


WRITES = (
    "{{% for t in tools or [] %}}{{{{ t|tojson }}}}{{% endfor %}}{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n"
    "{{{{ m.content or '' }}}}{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
AS_JSON = '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments|tojson }}}</tool_call>'
FENCED = "<tool_call>{{ c.function.name }}\n```json\n{{ c.function.arguments|tojson }}\n```</tool_call>"
OTHER_TAGS = "<my:tool_call><function={{ c.function.name }}>{{ c.function.arguments|tojson }}</function></my:tool_call>"
ELEMENTS = (
    "<tool_call>{{ c.function.name }}{% for k, v in c.function.arguments|items %}<arg_key>{{ k }}</arg_key>"
    "<arg_value>{{ v if v is string else v|tojson }}</arg_value>{% endfor %}</tool_call>"
)
QUOTED = (
    "<|python_start|>[{{ c.function.name }}({% for k, v in c.function.arguments|items %}{{ ', ' if loop.index0 }}"
    '{{ k }}="{{ v }}"{% endfor %})]<|python_end|>'
)
SEPARATED = ELEMENTS.replace("{{ c.function.name }}", "{{ c.function.name }}<tool_sep>")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (AS_JSON, "hermes"),
        (ELEMENTS, "glm"),
        (QUOTED, "llama4"),
        (FENCED, "generic"),
        (OTHER_TAGS, "generic"),
        (SEPARATED, "generic"),
    ],
)
def test_a_format_reads_what_the_template_writes(make_byte_tokenizer, tmp_path, call, name):
    """A marker in the template's text is not enough."""
    tokenizer = make_byte_tokenizer(tags=False)
    tokenizer.chat_template = WRITES.format(call=call)
    found = find_format(tokenizer)
    tools = "generic" if name == "generic" else "native"
    assert (found.name, found.capabilities.tools) == (name, tools)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": tokenizer.chat_template}))
    assert tools_of(tmp_path) == tools
