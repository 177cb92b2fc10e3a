"""What templates are given, which one is taken, and what happens when one fails."""

import gc
import weakref

import pytest

from cai_runtime.errors import ConversationError
from cai_runtime.formats.messages import Message, parse_messages
from cai_runtime.formats.template import chat_template, render

TEXT = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
PARTS = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}[{{ p.text }}]{% endfor %};{% endfor %}"
BOTH = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content if p.type == 'text' %}[{{ p.text }}]{% endfor %}{% endif %};{% endfor %}"
)
PRINTS = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
PRINTS_JSON = "{% for m in messages %}{{ m.content if m.content is string else m.content|tojson }};{% endfor %}"
USER_PARTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'user' %}{% for p in m.content %}[{{ p.text }}]{% endfor %}"
    "{% else %}{{ '' + m.content }}{% endif %};{% endfor %}"
)


def text_of(tokenizer, template, messages):
    tokenizer.chat_template = template
    return tokenizer.decode(render(tokenizer, parse_messages(messages)))


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("template", "given", "want"),
    [
        (TEXT, "a", "user:a;"),
        (TEXT, parts("a", "b"), "user:a\nb;"),
        (PARTS, "a", "user:[a];"),
        (PARTS, parts("a", "b"), "user:[a][b];"),
        (BOTH, "a", "user:a;"),
        (BOTH, parts("a", "b"), "user:[a][b];"),
        (PRINTS, parts("a", "b"), "user:a\nb;"),
        (PRINTS_JSON, parts("a", "b"), "a\nb;"),
    ],
)
def test_parts_go_to_templates_that_take_parts(byte_tokenizer, template, given, want):
    assert text_of(byte_tokenizer, template, [{"role": "user", "content": given}]) == want


def test_form_is_found_for_each_role(byte_tokenizer):
    conversation = [
        {"role": "system", "content": parts("s", "t")},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": parts("a")},
        {"role": "user", "content": parts("v", "w")},
    ]
    assert text_of(byte_tokenizer, USER_PARTS, conversation) == "system:s\nt;user:[u];assistant:a;user:[v][w];"
    forms = chat_template(byte_tokenizer).forms.turns.content
    assert (forms["system"], forms["user"], forms["assistant"]) == ("text", "parts", "text")


def test_parts_are_rendered_as_transformers_does(byte_tokenizer):
    byte_tokenizer.chat_template = BOTH
    messages = [{"role": "user", "content": parts("one", " two")}, {"role": "assistant", "content": "three"}]
    want = byte_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert render(byte_tokenizer, parse_messages(messages)) == want


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "can't be compiled"),
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{{ 1 + messages }}", "TypeError: unsupported operand"),
        ("{{ range(10 ** 9)|list }}", "OverflowError"),
        ("{{ 2 ** 70000 }}", "ValueError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "OverflowError"),
        ("{{ messages[0].content.nope.nope }}", "nope"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_failing_template_is_named_and_quoted(byte_tokenizer, template, words):
    byte_tokenizer.chat_template = {"odd": template}
    with pytest.raises(ConversationError, match=r"chat template \(odd\)") as caught:
        render(byte_tokenizer, [Message("user", "hi")])
    assert words in str(caught.value) and caught.value.param == "messages"


def test_long_words_are_cut(byte_tokenizer):
    byte_tokenizer.chat_template = "{{ raise_exception(messages[0].content * 100) }}"
    with pytest.raises(ConversationError) as caught:
        render(byte_tokenizer, [Message("user", "x" * 100)])
    assert len(str(caught.value)) < 700


def test_several_templates(byte_tokenizer):
    byte_tokenizer.chat_template = {"rag": "R{{ messages[0].content }}", "tool": "T{{ messages[0].content }}"}
    hi = [Message("user", "hi")]
    assert byte_tokenizer.decode(render(byte_tokenizer, hi, "rag")) == "Rhi"
    with pytest.raises(ConversationError, match="rag, tool") as caught:
        render(byte_tokenizer, hi)
    assert caught.value.param == "chat_template"
    with pytest.raises(ConversationError, match="'other'.*rag, tool"):
        render(byte_tokenizer, hi, "other")
    byte_tokenizer.chat_template = {**byte_tokenizer.chat_template, "default": "D"}
    assert byte_tokenizer.decode(render(byte_tokenizer, hi)) == "D"


def test_template_text_is_not_taken_from_a_request(byte_tokenizer):
    with pytest.raises(ConversationError, match="no chat template named"):
        render(byte_tokenizer, [Message("user", "hi")], "{{ 'x' }}")


@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt, type("SoftTimeLimit", (Exception,), {})])
def test_exceptions_that_are_not_the_templates_come_out_as_they_are(byte_tokenizer, monkeypatch, error):
    """A time limit's signal handler raises wherever the thread happens to be."""

    def interrupted(*_, **__):
        raise error("time is up")

    template = chat_template(byte_tokenizer)
    monkeypatch.setattr(template.program, "run", interrupted)
    with pytest.raises(error):
        template.text([Message("user", "hi")])


def test_tokenizer_is_freed(make_byte_tokenizer):
    tokenizer = make_byte_tokenizer()
    render(tokenizer, [Message("user", "<|im_end|>")])
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None


def test_another_template_is_noticed(byte_tokenizer):
    for template, want in ((TEXT, "user:hi;"), (PARTS, "user:[hi];")):
        assert text_of(byte_tokenizer, template, [{"role": "user", "content": "hi"}]) == want
