"""What published chat templates write of calls and thoughts is read back, whole and in pieces; transformers' own parser
reads the same. See `published` for where they come from."""

import json

import pytest
from published import npm_tokenizer, response_templates, trl_templates
from transcripts import ASKED, TIME, WEATHER, fold, play, spec_of, tokens_of, turn_of

from cai_runtime.engine.tokenizer import load_tokenizer
from cai_runtime.formats.conversation import Conversation
from cai_runtime.formats.find import find_format
from cai_runtime.formats.history import declared
from cai_runtime.formats.rendering import render_conversation

pytestmark = pytest.mark.slow

ENDS = ("<|im_end|>", "<|eot_id|>", "<|return|>", "<|call|>")
# template -> (format, tokenizer of npm or None for bytes, response_template of trl or None)
CASES = {
    "qwen2_5": ("hermes", "qwen3", "qwen3"),
    "qwen3": ("hermes", "qwen3", "qwen3"),
    "qwen3_instruct_2507": ("hermes", "qwen3", "qwen3"),
    "qwen3_5_think": ("qwen_coder", None, "qwen3_5"),
    "qwen3_8": ("qwen_coder", None, "qwen3_5"),
    "nemotron_3_nano": ("qwen_coder", None, "nemotron_3"),
    "nemotron_3_super": ("qwen_coder", None, "nemotron_3"),
    "glm4moe": ("glm", None, "glm4moe"),
    "llama3_1": ("llama3", "llama3_1", "llama3"),
    "llama3_2": ("llama3", "llama3_1", "llama3"),
    "gptoss": ("harmony", "gptoss", "gptoss"),
    "lfm2_2_5": ("lfm2", None, None),
    "lfm2_v2": ("lfm2", None, None),
}
CALLS = [
    ("get_weather", {"city": 'São "P" {}[] 🙂', "days": 2, "exact": True, "where": {"lat": -1.5}, "tags": ["a", "}"]}),
    ("get_time", {}),
]


@pytest.fixture(scope="module", params=CASES)
def case(request, make_byte_tokenizer):
    """(name, tokenizer, format, response template)"""
    from tokenizers import AddedToken

    name, (expected, family, described) = request.param, CASES[request.param]
    source = (trl_templates() / f"{name}.jinja").read_text()
    tokenizer = load_tokenizer(npm_tokenizer(family)) if family else make_byte_tokenizer(tags=False)
    tokenizer.chat_template = source
    found = find_format(tokenizer)
    if family is None:
        markers = [*type(found).openers, *found.closers, *found.inner, *(found.thought or ())]
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in markers])
        found = find_format(tokenizer)
    assert found.name == expected and found.capabilities.tools == "native"
    return name, tokenizer, found, response_templates()[described] if described else None


def written(case, calls, **fields):
    """(the prompt's text, what the template writes of an assistant's turn after it)"""
    _, tokenizer, _, _ = case
    asked = [{"role": "user", "content": ASKED[0].content}]
    given = [{"type": "function", "function": {"name": name, "arguments": args}} for name, args in calls]
    turn = {"role": "assistant", "content": "", **fields, **({"tool_calls": given} if calls else {})}
    options = {"tools": declared([WEATHER, TIME], whole=True), "tokenize": False}
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template([*asked, turn], **options)
    if not whole.startswith(prompt):  # the template writes thoughts of turns before in another way
        prompt = prompt[: prompt.rindex("<think>")]
    assert whole.startswith(prompt)
    answer = whole[len(prompt) :]
    for end in ENDS:
        answer = answer.partition(end)[0] if end in answer else answer
    return prompt, answer


def read(case, prompt, answer, cuts=None):
    _, tokenizer, found, _ = case
    turn = turn_of(thinks=found.is_thinking(prompt[-40:]))
    markers = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    tokens = tokens_of(tokenizer, answer, markers)
    end = tokenizer.convert_tokens_to_ids("</s>") if tokenizer.eos_token == "</s>" else tokenizer.eos_token_id
    spec = spec_of(tokenizer, ends=[tokenizer.convert_ids_to_tokens(end)])
    folds = [fold(play(found.output(turn)(spec), [*tokens, end], groups)) for groups in (None, [3] * 500, [10_000])]
    assert folds[0] == folds[1] == folds[2]
    return folds[0]


def oracle(case, prompt, answer):
    from transformers.utils.chat_parsing import parse_response

    tools = declared([WEATHER, TIME], whole=True)
    return parse_response(answer, case[3], prefix=prompt, tools=tools)


def one_at_a_time(name):
    return name in ("llama3_1", "llama3_2", "gptoss")


def test_calls_are_read_back(case):
    name, _, _, described = case
    for calls in [CALLS[:1], CALLS[1:]] if one_at_a_time(name) else [CALLS]:
        prompt, answer = written(case, calls)
        found = read(case, prompt, answer)
        assert [(function, json.loads(arguments)) for function, arguments in found.calls] == calls
        assert (found.content, found.reason) == ("", "tool_calls")
        if described is not None and name not in ("llama3_1", "llama3_2", "gptoss"):
            theirs = oracle(case, prompt, answer)
            assert [(c["function"]["name"], c["function"]["arguments"]) for c in theirs["tool_calls"]] == calls


def test_content_and_a_thought_are_read_back(case):
    name, _, found, described = case
    if found.thought is None:
        pytest.skip("without thoughts")
    prompt, answer = written(case, CALLS, content="Let me see.", reasoning_content="Hm,\n\nwell.")
    reply = read(case, prompt, answer)
    if "well." in answer:
        assert reply.reasoning == "Hm,\n\nwell."
    assert len(reply.calls) == 2
    assert reply.content == ("Let me see." if "Let me see." in answer else "")
    if described is not None and name.startswith("qwen3"):
        theirs = oracle(case, prompt, answer)
        assert theirs.get("content", "").strip() == reply.content
        assert theirs.get("reasoning_content", "").strip() == reply.reasoning


def test_the_real_prompt_tells_whether_a_thought_is_open(case):
    name, tokenizer, found, _ = case
    rendered = render_conversation(tokenizer, Conversation(ASKED, tools=(TIME,)))
    opened = {"qwen3_5_think", "qwen3_8", "nemotron_3_nano", "nemotron_3_super"}
    assert found.is_thinking(rendered.opening) == (name in opened)
    assert rendered.tools == "native"


def test_a_response_template_tells_the_format(make_byte_tokenizer):
    names = {"qwen3": "hermes", "qwen3_5": "qwen_coder", "glm4moe": "glm", "gptoss": "harmony"}
    for described, name in names.items():
        tokenizer = make_byte_tokenizer(tags=False)
        tokenizer.response_template = response_templates()[described]
        assert find_format(tokenizer).name == name
