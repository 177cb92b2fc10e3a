"""Every format's answers through the endpoints: however their tokens come, the fold of the stream is the whole reply."""

import json
from functools import cache

import pytest
from families import FAMILIES, Family, made, marker_texts
from folds import bare, difference, fold_chat, fold_completion, fold_response
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from player import Player
from published import npm_tokenizer, trl_templates
from transcripts import ASKED, tokens_of

from cai_runtime import Client
from cai_runtime.engine.tokenizer import load_tokenizer
from cai_runtime.formats.find import find_format

SETTINGS = settings(
    max_examples=200, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
TEMPLATE = """
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for m in messages %}
{{- m.role + ':' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}
"""
THINKING = TEMPLATE.replace("'assistant:'", "'assistant:<think>\\n'")
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Of a place.", "parameters": parameters}}
    for name, parameters in (("get_weather", CITY), ("get_time", {"type": "object", "properties": {}}))
]
FLAT_TOOLS = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
QUESTION = [{"role": "user", "content": ASKED[0].content}]
CALLS = [("get_weather", {"city": "\"{🙂\n<'", "days": -3, "tags": ["]}"]}), ("get_time", {})]
TEXT = "He[x]{\n 🙂é <b> \n\nll"
THOUGHT = "Hm\n\nl."
# Each format with its own markers, and published templates: how these write answers, test_real_transcripts reads.
PLAIN = Family("plain", lambda calls: TEXT)
BY_FORMAT = [PLAIN, *{family.format: family for family in reversed(FAMILIES)}.values()]
PUBLISHED = {"qwen3": "qwen3", "llama3_1": "llama3_1", "gptoss": "gptoss"}  # template -> tokenizer


def written_by_family(family, make_byte_tokenizer):
    """(tokenizer, format's name, four transcripts)"""
    tokenizer, fmt = made.__wrapped__(family, make_byte_tokenizer)
    tokenizer.chat_template = THINKING if family.format == "qwen_coder" else TEMPLATE
    thought = family.thought(THOUGHT).removeprefix("<think>\n" if tokenizer.chat_template == THINKING else "")
    texts = [
        thought + ("" if family.bare else family.content("I see.")) + family.write(CALLS) + family.final(TEXT),
        thought + family.final(TEXT).removeprefix("<|start|>assistant"),
        family.write(CALLS),
        thought + family.write(CALLS)[:-20],
    ]
    return tokenizer, family.format, [tokens_of(tokenizer, text, marker_texts(fmt)) for text in texts]


def written_by_template(name):
    """The same by a published template."""
    tokenizer = load_tokenizer(npm_tokenizer(PUBLISHED[name]))
    tokenizer.chat_template = (trl_templates() / f"{name}.jinja").read_text()
    calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in CALLS]
    turns = [{"content": TEXT}, {"content": "I see.", "reasoning_content": THOUGHT}]
    turns += [{"content": "", "tool_calls": [call]} for call in calls]
    markers = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    prompt = tokenizer.apply_chat_template(QUESTION, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    transcripts = []
    for turn in turns:
        whole = [*QUESTION, {"role": "assistant", **turn}]
        text = tokenizer.apply_chat_template(whole, tools=TOOLS, tokenize=False)
        assert text.startswith(prompt)
        transcripts.append(tokens_of(tokenizer, text[len(prompt) :], markers))
    return tokenizer, find_format(tokenizer).name, transcripts


class Model:
    """A client over a player of the answers of a format."""

    def __init__(self, client, player, transcripts):
        self.client, self.player = client, player
        self.answers = [[*tokens, player.engine.tokenizer.eos_token_id] for tokens in transcripts]
        self.has_tools = client._host.open(client._host.resolve(None)).format.capabilities.tools is not None
        self.at_once = cache(self._at_once)

    def _at_once(self, create, first, *options):
        self.player.answers, self.player.sizes = self.answers[first:] + self.answers[:first], None
        return bare(create(self, **dict(options)))

    def replies(self, create, first, sizes, **options):
        """(the whole reply to tokens that come at once, another to groups of them, the chunks of these)"""
        options = {name: value for name, value in options.items() if value is not None}
        at_once = self.at_once(create, first, *options.items())
        self.player.answers, self.player.sizes = self.answers[first:] + self.answers[:first], sizes
        return at_once, bare(create(self, **options)), list(create(self, **options, stream=True))


@pytest.fixture(
    scope="module", params=[*BY_FORMAT, *PUBLISHED], ids=lambda of: of if isinstance(of, str) else of.format
)
def model(request, make_byte_tokenizer, tmp_path_factory):
    of = request.param
    tokenizer, name, transcripts = (
        written_by_template(of) if isinstance(of, str) else written_by_family(of, make_byte_tokenizer)
    )
    player = Player.of(tokenizer, [tokenizer.eos_token_id])
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with Client(path, format=name, _engine_factory=lambda path, **options: player.engine) as client:
        yield Model(client, player, transcripts)


FIRST = st.integers(0, 3)  # transcript
SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=30)
LENGTH = st.sampled_from([None, 1, 30, 60])
STOP = st.sampled_from([None, "see", "ll", "🙂é", "{"])


def usage_of(stream):
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}


def chat(model, logprobs, stream=False, **options):
    options |= {"logprobs": True, "top_logprobs": 2} if logprobs else {}
    options |= {"tools": TOOLS} if model.has_tools else {}
    return model.client.chat.completions.create(messages=QUESTION, **options, **usage_of(stream))


@given(FIRST, SIZES, LENGTH, STOP, st.booleans(), st.integers(1, 2))
@SETTINGS
def test_chat(model, first, sizes, length, stop, logprobs, n):
    whole, grouped, chunks = model.replies(chat, first, sizes, max_tokens=length, stop=stop, logprobs=logprobs, n=n)
    assert not difference(bare(fold_chat(chunks)), whole) and not difference(grouped, whole)


def respond(model, logprobs, **options):
    options |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2} if logprobs else {}
    options |= {"tools": FLAT_TOOLS} if model.has_tools else {}
    return model.client.responses.create(input=QUESTION, **options)


@given(FIRST, SIZES, LENGTH, STOP, st.booleans())
@SETTINGS
def test_responses(model, first, sizes, length, stop, logprobs):
    length = length and max(16, length)
    options = {"max_output_tokens": length, "stop": stop, "logprobs": logprobs}
    whole, grouped, events = model.replies(respond, first, sizes, **options)
    assert not difference(bare(fold_response(events)), whole) and not difference(grouped, whole)


def complete(model, stream=False, **options):
    return model.client.completions.create(prompt=["It is 🙂", "x"], **options, **usage_of(stream))


@pytest.mark.parametrize("model", [PLAIN, "qwen3", "llama3_1"], indirect=True, ids=["bytes", "qwen3", "llama3_1"])
@given(FIRST, SIZES, LENGTH, STOP, st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 2))
@SETTINGS
def test_completions(model, first, sizes, length, stop, logprobs, echo, n):
    options = {"max_tokens": length or 500, "stop": stop, "logprobs": logprobs, "echo": echo, "n": n}
    whole, grouped, chunks = model.replies(complete, first, sizes, **options)
    assert not difference(fold_completion(chunks), whole) and not difference(grouped, whole)
