"""Which format a checkpoint gets."""

import pytest

from cai_runtime.errors import ConversationError, OptionValueError
from cai_runtime.formats.conversation import Conversation, Tool
from cai_runtime.formats.find import FORMATS, find_format
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
