"""/models: the catalogue's entries as the API reference has them, and local models beside them."""

import json

import pytest
from openai.pagination import SyncPage
from openai.types import Model

from cai_runtime import BadRequestError, NotFoundError
from cai_runtime.api import host
from cai_runtime.convert.named import NAMED
from cai_runtime.models.catalog import format_parameters

pytestmark = pytest.mark.usefixtures("home")  # without what this machine has pulled

# The reference's GET /models: id, created, owned_by, parameters_number, and whether the model supports audio, images,
# function calling, chat completion, responses.
REFERENCE = """
llama-4-scout                   1749600000 meta                 108B   ..fcr
cai-llama-4-scout-slim          1749600000 multiverse_computing 53.35B ..fcr
cai-llama-3-1-8b-slim           1753892192 multiverse_computing 3.28B  ..fc.
llama-3-1-8b                    1749600000 meta                 8B     ..fc.
cai-llama-3-3-70b-slim          1749600000 multiverse_computing 35B    ..fc.
llama-3-3-70b                   1749600000 meta                 70B    ..fc.
mistral-small-3-1               1749600000 mistralai            24B    .i.c.
cai-mistral-small-3-1-slim      1759492927 multiverse_computing 12B    .i.c.
nemotron-3-nano-omni            1749600000 nvidia               31B    ai.cr
gpt-oss-20b                     1754488130 openai               20B    ..fcr
gpt-oss-120b                    1754488130 openai               120B   ..fcr
whisper-large-v3                1749600000 openai               1.5B   a....
cai-whisper-large-v3-turbo-slim 1749600000 multiverse_computing 0.4B   a....
hypernova-60b                   1753892192 multiverse_computing 60B    ..fcr
blackstar-10b                   1753892192 multiverse_computing 10B    ...cr
glm-5-1                         1753892192 zai-org              754B   ..fcr
"""


def reference_entries():
    for line in REFERENCE.strip().splitlines():
        name, created, owner, parameters, flags = line.split()
        yield {
            "id": name,
            "created": int(created),
            "object": "model",
            "owned_by": owner,
            "parameters_number": parameters,
            "capabilities": {
                "supports_audio": flags[0] == "a",
                "supports_image": flags[1] == "i",
                "supports_function_calling": flags[2] == "f",
                "support_chat_completion": flags[3] == "c",
                "supports_responses": flags[4] == "r",
            },
        }


@pytest.fixture
def checkpoint(tmp_path):
    """A dense checkpoint of 2 x 500 + 250 parameters, with a chat template."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "tiny"
    path.mkdir()
    save_file({"a.weight": torch.zeros(2, 500), "norm.weight": torch.zeros(250)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    return path


def test_catalogue_is_the_references(new_client, valid):
    page = new_client().models.list()
    assert isinstance(page, SyncPage) and page.object == "list" and list(page) == page.data
    assert [model.to_dict() for model in page.data] == list(reference_entries())
    for model in page:
        valid(model, Model)
        assert model.capabilities == model.to_dict()["capabilities"]


@pytest.mark.parametrize("entry", list(reference_entries()), ids=lambda entry: entry["id"])
def test_retrieve(client, entry):
    assert client.models.retrieve(entry["id"]).to_dict() == entry


def test_local_models_follow(new_client, checkpoint, model_dir, valid):
    client = new_client(checkpoint, models={"mine": checkpoint, "broken": model_dir, "llama-3-1-8b": checkpoint})
    own = client.models.list().data[16:]
    assert [model.id for model in own] == ["mine", "broken", str(checkpoint)]
    for model in own:
        valid(model, Model)
        assert model.owned_by == "local" and client.models.retrieve(model.id) == model
    assert [model.parameters_number for model in own] == ["1.25K", "unknown", "1.25K"]
    for capability in ("support_chat_completion", "supports_responses", "supports_function_calling"):
        assert [model.capabilities[capability] for model in own] == [True, False, True]
    assert own[0].created == int((checkpoint / "config.json").stat().st_mtime)


NATIVE = (
    "{% for t in tools or [] %}<tools>{{ t|tojson }}</tools>{% endfor %}{% for m in messages %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments|tojson }}{% endfor %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("file", "stored", "tools"),
    [
        (None, None, None),
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ messages[0].content }}"}), "generic"),
        ("tokenizer_config.json", json.dumps({"chat_template": NATIVE}), "native"),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": "x"},
                                                                {"name": "tool_use", "template": NATIVE}]}), "native"),
        ("chat_template.json", json.dumps({"chat_template": NATIVE}), "native"),
        ("chat_template.jinja", NATIVE, "native"),
        ("chat_template.jinja", NATIVE.replace("tool_call>", "a format that nobody knows>"), "generic"),
        ("chat_template.jinja", "{% for %}", "generic"),
    ],
)  # fmt: skip
def test_how_a_local_model_is_told_of_tools(new_client, factory, model_dir, file, stored, tools):
    if file:
        (model_dir / file).write_text(stored)
    model = new_client(models={"mine": model_dir}).models.retrieve("mine")
    assert model.tools == tools and model.capabilities["supports_function_calling"] == (tools is not None)
    assert factory.opened == []


def test_registered_but_gone(new_client, tmp_path):
    (model,) = new_client(models={"gone": tmp_path / "gone"}).models.list().data[16:]
    assert (model.id, model.created, model.parameters_number) == ("gone", 0, "unknown")


def test_retrieve_unknown(client):
    for name in ("nothing", "/nowhere"):
        with pytest.raises(NotFoundError) as caught:
            client.models.retrieve(name)
        assert (caught.value.status_code, caught.value.code) == (404, "model_not_found")
    for name in ("", None, 3):
        with pytest.raises(BadRequestError):
            client.models.retrieve(name)


def test_pulled_models_are_known_by_name(new_client, checkpoint, monkeypatch):
    name, other = [name for name, named in NAMED.items() if named.kind == "model"][:2]
    monkeypatch.setattr(host, "pulled", lambda asked: checkpoint if asked == name else None)
    client = new_client(name)
    (model,) = client.models.list().data[16:]
    assert model.id == name and model.parameters_number == "1.25K"
    assert client.models.retrieve(name) == model
    assert client.models.retrieve(f"{name}-r").id == f"{name}-r"
    with pytest.raises(NotFoundError, match=f"cai pull {other}"):
        client.models.retrieve(other)


def test_listing_opens_nothing(client, factory):
    client.models.list()
    client.models.retrieve("abc")
    assert factory.opened == []


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1250, "1.25K"), (134_515_008, "135M"), (999_600_000, "1B"), (3_281_000_000, "3.28B"),
     (8_030_000_000, "8.03B"), (70_553_706_496, "70.55B"), (753_900_000_000, "754B"), (10_000_000, "10M")],
)  # fmt: skip
def test_format_parameters(count, text):
    assert format_parameters(count) == text
