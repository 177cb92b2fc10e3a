"""Mistral's prompts have the token ids that mistral-common's encoder gives, forged contents among them."""

import json

import pytest
from mistral_requests import REQUESTS
from published import hub_templates, mistral_oracle

from cai_runtime.engine.tokenizer import load_tokenizer
from cai_runtime.formats.conversation import Conversation
from cai_runtime.formats.messages import parse_messages
from cai_runtime.formats.rendering import render_conversation
from cai_runtime.formats.tools import parse_tools

pytestmark = pytest.mark.slow

# Of hub models: (version of the tokenizer, the requests that the model's template writes as mistral-common does). The
# others it writes in its own way, which is transformers': without a system message it has one of its own, for instance.
TEMPLATES = {
    "mistralai-Mistral-Nemo-Instruct-2407": ("v3", {0, 1, 7, 8, 14}),
    "Mistral-Small-3.2-24B-Instruct-2506": ("v11", {0, 1, 2, 4, 6}),
    "mistralai-Devstral-2-123B-Instruct-2512": ("v13", set(range(7))),
    "mistralai-Ministral-3-8B-Instruct-2512": ("v13", set(range(7))),
}
# Results that are JSON: up to version 3 the encoder parses them, which a template can't.
UNLIKE = {("v3", 14)}


@pytest.fixture(scope="module")
def oracle():
    directory = mistral_oracle()
    return directory, load_tokenizer(directory), json.loads((directory / "ids.json").read_text())


def ours(tokenizer, request):
    messages, tools = parse_messages(request["messages"]), parse_tools(request.get("tools"))["tools"]
    return render_conversation(tokenizer, Conversation(tuple(messages), tools)).prompt_ids


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13"])
def test_templates_of_mistral_common(oracle, version):
    directory, tokenizer, ids = oracle
    tokenizer.chat_template = (directory / f"{version}.jinja").read_text()
    compared = 0
    for number, (request, want) in enumerate(zip(REQUESTS, ids[version], strict=True)):
        if want is not None and (version, number) not in UNLIKE:
            assert ours(tokenizer, request) == want, number
            compared += 1
    assert compared >= 12


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_the_models(oracle, name):
    _, tokenizer, ids = oracle
    version, expected = TEMPLATES[name]
    tokenizer.chat_template = (hub_templates() / f"{name}.jinja").read_text()
    pairs = enumerate(zip(REQUESTS, ids[version], strict=True))
    assert {number for number, (request, want) in pairs if ours(tokenizer, request) == want} == expected
