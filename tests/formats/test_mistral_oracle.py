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

# Templates of hub models: version of their tokenizer -> those of the requests that they write as mistral-common does.
TEMPLATES = {
    "mistralai-Mistral-Nemo-Instruct-2407": ("v3", 5),
    "Mistral-Small-3.2-24B-Instruct-2506": ("v11", 5),
    "mistralai-Devstral-2-123B-Instruct-2512": ("v13", 5),
    "mistralai-Ministral-3-8B-Instruct-2512": ("v13", 5),
}


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
    for request, want in zip(REQUESTS, ids[version], strict=True):
        if want is not None:
            assert ours(tokenizer, request) == want
            compared += 1
    assert compared >= 6


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_the_models(oracle, name):
    _, tokenizer, ids = oracle
    version, number = TEMPLATES[name]
    tokenizer.chat_template = (hub_templates() / f"{name}.jinja").read_text()
    equal = [ours(tokenizer, request) == want for request, want in zip(REQUESTS, ids[version], strict=True)]
    assert sum(equal) >= number, equal
