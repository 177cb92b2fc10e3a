"""What published chat templates write of calls and thoughts is read back, whole and in pieces; transformers' own parser
reads the same. See `published` for where they come from."""

import json
import random

import pytest
from published import hub_templates, mistral_oracle, npm_tokenizer, response_templates, trl_templates
from tool_conversations import CLOCK, TOOL_CONVERSATIONS, as_openai, as_taken
from tool_conversations import WEATHER as TOWN_WEATHER
from transcripts import ASKED, TIME, WEATHER, fold, play, spec_of, tokens_of, turn_of

from cai_runtime.engine.tokenizer import load_tokenizer
from cai_runtime.formats.conversation import Conversation
from cai_runtime.formats.find import FORMATS, find_format
from cai_runtime.formats.history import declared, turns_of
from cai_runtime.formats.marked import THOUGHTS
from cai_runtime.formats.messages import Call, Message, parse_messages
from cai_runtime.formats.rendering import render_conversation
from cai_runtime.formats.template import chat_template
from cai_runtime.formats.tools import parse_tools

pytestmark = pytest.mark.slow

ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|return|>", "<|call|>", "</s>")
# template of trl, or of a hub model -> (format, tokenizer of npm, or "mistral", or None for bytes, response_template of trl)
CASES = {
    "qwen2_5": ("hermes", "qwen3", "qwen3"),
    "qwen3": ("hermes", "qwen3", "qwen3"),
    "qwen3_instruct_2507": ("hermes", "qwen3", "qwen3"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("hermes", None, None),
    "NousResearch-Hermes-4-14B": ("hermes", None, None),
    "qwen3_5_think": ("qwen_coder", None, "qwen3_5"),
    "qwen3_8": ("qwen_coder", None, "qwen3_5"),
    "Qwen-Qwen3-Coder-30B-A3B-Instruct": ("qwen_coder", None, None),
    "nemotron_3_nano": ("qwen_coder", None, "nemotron_3"),
    "nemotron_3_super": ("qwen_coder", None, "nemotron_3"),
    "glm4moe": ("glm", None, "glm4moe"),
    "GLM-4.6": ("glm", None, None),
    "GLM-4.7-Flash": ("glm", None, None),
    "zai-org-GLM-5": ("glm", None, None),
    "zai-org-GLM-5.2": ("glm", None, None),
    "llama3_1": ("llama3", "llama3_1", "llama3"),
    "llama3_2": ("llama3", "llama3_1", "llama3"),
    "trl-internal-testing-tiny-Llama4ForCausalLM": ("llama4", None, None),
    "gptoss": ("harmony", "gptoss", "gptoss"),
    "lfm2_2_5": ("lfm2", None, None),
    "lfm2_v2": ("lfm2", None, None),
    "mistralai-Mistral-7B-Instruct-v0.3": ("mistral", "mistral", None),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", "mistral", None),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral", "mistral", None),
    "mistralai-Devstral-2-123B-Instruct-2512": ("mistral", "mistral", None),
    "mistralai-Ministral-3-8B-Instruct-2512": ("mistral", "mistral", None),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("mistral", "mistral", None),
    "mistralai-Mistral-Small-4-119B-2603": ("mistral", "mistral", None),
}
# Templates whose calls no format reads, or that show none: (format, what shows that).
AS_TEXT = {
    "ByteDance-Seed-OSS": ("generic", "<seed:tool_call>"),
    "meetkai-functionary-medium-v3.1": ("generic", "<function=example_function_name>{"),
    "openbmb-MiniCPM3-4B": ("generic", "<|tool_call_start|>"),
    "tencent-Hunyuan-7B-Pretrain": ("generic", "<tool_call>"),
    "tencent-Hy3-preview": ("generic", "<arg_key>"),
    "mistralai-Mistral-Small-3.1-24B-Instruct-2503": ("generic", "[SYSTEM_PROMPT]"),
    "HuggingFaceTB-SmolLM3-3B@3e0e27": ("hermes", "<tool_call>"),
}
CALLS = [
    ("get_weather", {"city": 'São "P" {}[] 🙂', "days": 2, "exact": True, "where": {"lat": -1.5}, "tags": ["a", "}"]}),
    ("get_time", {}),
]


def source_of(name):
    path = trl_templates() / f"{name}.jinja"
    return (path if path.exists() else hub_templates() / f"{name}.jinja").read_text()


@pytest.fixture(scope="module", params=CASES)
def case(request, make_byte_tokenizer):
    """(name, tokenizer, format, response template)"""
    from tokenizers import AddedToken

    name, (expected, family, described) = request.param, CASES[request.param]
    source = source_of(name)
    if family is None:
        tokenizer, kind = make_byte_tokenizer(tags=False), FORMATS[expected]
        markers = [text for text in (*kind.openers, *kind.closers, *kind.inner) if text in source]
        markers += [text for pair in THOUGHTS for text in pair if pair[1] in source]
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in markers])
    else:
        tokenizer = load_tokenizer(mistral_oracle() if family == "mistral" else npm_tokenizer(family))
    tokenizer.chat_template = source
    found = find_format(tokenizer)
    assert found.name == expected and found.capabilities.tools == "native"
    return name, tokenizer, found, response_templates()[described] if described else None


def takes(case):
    return chat_template(case[1], for_tools=True).forms.turns


def written(case, calls, content=None, reasoning=None):
    """(the prompt's text, what the template writes of an assistant's turn after it)"""
    _, tokenizer, _, _ = case
    given = tuple(
        Call(f"abcdefgh{i}", name, json.dumps(args, ensure_ascii=False)) for i, (name, args) in enumerate(calls)
    )
    messages = [*ASKED, Message("assistant", content, calls=given, reasoning=reasoning)]
    asked, turn = json.loads(json.dumps(turns_of(messages, takes(case))))
    options = {"tools": declared([WEATHER, TIME], whole=True), "tokenize": False}
    prompt = tokenizer.apply_chat_template([asked], add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template([asked, turn], **options)
    opened = prompt
    while not whole.startswith(prompt):  # the template writes thoughts of turns before in another way
        prompt = prompt[: max(prompt.rfind("<"), prompt.rfind("["))]
    assert ASKED[0].content in prompt
    answer = whole[len(prompt) :]
    if answer.startswith("</think>"):  # an empty thought, whose beginning the real prompt has
        prompt = opened
    for end in ENDS:
        answer = answer.partition(end)[0] if end in answer else answer
    return prompt, answer


def tokenized(case, answer, by_character=False):
    _, tokenizer, _, _ = case
    return tokens_of(tokenizer, answer, [str(token) for token in tokenizer.added_tokens_decoder.values()], by_character)


def read(case, prompt, tokens, cuts=None, *, ends=True):
    _, tokenizer, found, _ = case
    turn = turn_of(thinks=found.is_thinking(prompt[-40:]))
    end = tokenizer.convert_tokens_to_ids("</s>") if tokenizer.eos_token == "</s>" else tokenizer.eos_token_id
    spec = spec_of(tokenizer, ends=[tokenizer.convert_ids_to_tokens(end)])
    return fold(play(found.output(turn)(spec), [*tokens, end] if ends else tokens, cuts))


def read_in_pieces(case, prompt, answer, cuts=6):
    """What is read, which is the same however the answer is cut."""
    rng, tokens = random.Random(answer), tokenized(case, answer)
    whole = read(case, prompt, tokens)
    for _ in range(cuts):
        assert read(case, prompt, tokens, [rng.randint(1, 12) for _ in tokens]) == whole
    assert read(case, prompt, tokens, [10_000]) == whole
    assert read(case, prompt, tokenized(case, answer, by_character=True)) == whole
    return whole


def groups(case):
    """Calls that the template takes in one message."""
    return [CALLS] if takes(case).calls.parallel else [CALLS[:1], CALLS[1:]]


def decoded(found):
    return [(function, json.loads(arguments)) for function, arguments in found.calls]


def oracle(case, prompt, answer):
    from transformers.utils.chat_parsing import parse_response

    tools = declared([WEATHER, TIME], whole=True)
    return parse_response(answer, case[3], prefix=prompt, tools=tools)


def test_calls_are_read_back(case):
    name, _, _, described = case
    for calls in groups(case):
        prompt, answer = written(case, calls)
        found = read_in_pieces(case, prompt, answer)
        assert decoded(found) == calls
        assert (found.content, found.reason) == ("", "tool_calls")
        if described is not None and name not in ("llama3_1", "llama3_2", "gptoss"):
            theirs = oracle(case, prompt, answer)
            assert [(c["function"]["name"], c["function"]["arguments"]) for c in theirs["tool_calls"]] == calls


def test_content_and_a_thought_are_read_back(case):
    name, _, found, described = case
    if found.thought is None:
        pytest.skip("without thoughts")
    prompt, answer = written(case, CALLS, "Let me see.", "Hm,\n\nwell.")
    reply = read_in_pieces(case, prompt, answer)
    if "well." in answer:
        assert reply.reasoning == "Hm,\n\nwell."
    assert len(reply.calls) == 2
    assert reply.content == ("Let me see." if "Let me see." in answer else "")
    if described is not None and name.startswith("qwen3"):
        theirs = oracle(case, prompt, answer)
        assert theirs.get("content", "").strip() == reply.content
        assert theirs.get("reasoning_content", "").strip() == reply.reasoning


def test_text_around_calls(case):
    _, _, found, _ = case
    if found.name == "harmony":
        pytest.skip("a call ends the answer")
    prompt, answer = written(case, groups(case)[0], "Let me see.")
    reply = read_in_pieces(case, prompt, answer + "\n\nDone.")
    assert decoded(reply) == groups(case)[0]
    before = "Let me see." if "Let me see." in answer else ""
    assert reply.content.replace("\n", "") == f"{before}Done."


def test_answers_that_were_cut(case):
    """Nothing that was told of a call is taken back."""
    prompt, answer = written(case, groups(case)[0])
    tokens = tokenized(case, answer)
    whole = read(case, prompt, tokens).calls
    for length in range(0, len(tokens), max(1, len(tokens) // 25)):
        found = read(case, prompt, tokens[:length], ends=False)
        assert found.reason == "length"
        for (name, arguments), (want, wanted) in zip(found.calls, whole, strict=False):
            assert name == want and wanted.startswith(arguments.removesuffix("\ufffd"))


def test_damaged_answers_are_read_the_same_however_they_are_cut(case):
    prompt, answer = written(case, groups(case)[0])
    rng = random.Random(case[0])
    for _ in range(8):
        at, length = rng.randrange(len(answer)), rng.randint(0, 3)
        damaged = answer[:at] + rng.choice(['"', "}", "]", "<", "é", "\n", ""]) + answer[at + length :]
        assert read_in_pieces(case, prompt, damaged, cuts=2).reason in ("stop", "length", "tool_calls")


def test_tools_have_transformers_ids(case):
    """Of honest text."""
    _, tokenizer, _, _ = case
    forms, compared = chat_template(tokenizer, for_tools=True).forms, 0
    for messages in TOOL_CONVERSATIONS:
        turns = as_taken(messages, forms)
        if turns is None or (messages[0]["role"] != "user" and not forms.system):
            continue
        tools = [TOWN_WEATHER, CLOCK]
        want = tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True, return_dict=True)
        conversation = Conversation(tuple(parse_messages(as_openai(messages))), parse_tools(tools)["tools"])
        assert render_conversation(tokenizer, conversation).prompt_ids == want["input_ids"]
        compared += 1
    assert compared >= 5


def test_the_real_prompt_tells_whether_a_thought_is_open(case):
    name, tokenizer, found, _ = case
    rendered = render_conversation(tokenizer, Conversation(ASKED, tools=(TIME,)))
    opened = {"qwen3_5_think", "qwen3_8", "nemotron_3_nano", "nemotron_3_super", "GLM-4.7-Flash", "zai-org-GLM-5",
              "zai-org-GLM-5.2"}  # fmt: skip
    assert found.is_thinking(rendered.opening) == (name in opened)
    assert rendered.tools == "native"


@pytest.mark.parametrize("name", AS_TEXT)
def test_templates_whose_calls_no_format_reads(make_byte_tokenizer, name):
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = source_of(name)
    expected, sign = AS_TEXT[name]
    assert sign in tokenizer.chat_template
    found = find_format(tokenizer)
    assert (found.name, found.capabilities.tools) == (expected, "generic")
    prompt = tokenizer.decode(found.prepare(Conversation(ASKED, tools=(TIME,))).prompt_ids)
    assert '{"name": "get_time"' in prompt and '{"name": "function name", "arguments"' in prompt


def test_a_response_template_tells_the_format(make_byte_tokenizer):
    names = {"qwen3": "hermes", "qwen3_5": "qwen_coder", "glm4moe": "glm", "gptoss": "harmony"}
    for described, name in names.items():
        tokenizer = make_byte_tokenizer(tags=False)
        tokenizer.response_template = response_templates()[described]
        assert find_format(tokenizer).name == name
