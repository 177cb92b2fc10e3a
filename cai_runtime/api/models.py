"""The endpoints /models and /models/{model}: the catalogue, and what is registered on this machine."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from openai.types import Model

from cai_runtime.api.errors import BadRequestError, NotFoundError
from cai_runtime.api.host import ModelHost, ResolvedModel, model_name, read_config
from cai_runtime.convert.named import NAMED
from cai_runtime.errors import CaiError
from cai_runtime.formats.find import tools_of
from cai_runtime.formats.template import template_of
from cai_runtime.models.catalog import Capabilities, CatalogEntry, catalog, format_parameters
from cai_runtime.models.registry import has_head, is_speech
from cai_runtime.scalars import shown
from cai_runtime.slim.embedding_files import EmbeddingFiles
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.speech.tokens import SpeechTokens

UNKNOWN = "unknown"


def list_models(host: ModelHost) -> list[Model]:
    """The catalogue's entries in their order, then the client's own: its registered names, what `cai pull` fetched by name,
    and its default, if that is a directory. Nothing is opened: checkpoints' headers are read."""
    pulled = {name: path for name, path in host.pulled_models().items() if name not in host.registered}
    own = {**host.registered, **pulled}
    if host.default is not None and host.default not in own and (directory := host.directory(host.default)):
        own[host.default] = directory
    local = [_local_model(host, name, path) for name, path in own.items() if name not in catalog()]
    return [*map(_as_model, catalog().values()), *local]


def retrieve_model(host: ModelHost, name: Any) -> Model:
    """One model of `list_models`, or that of any checkpoint directory.

    Raises:
        NotFoundError: there is none of this name.

    A name that ends in -r is its model's, with reasoning by default.
    """
    name = model_name(name)
    if entry := catalog().get(name):
        return _as_model(entry)
    path = host.registered.get(name) or host.directory(name)
    if path is not None and (name in host.registered or (path / "config.json").is_file()):
        return _local_model(host, name, path)
    if base := host.reasoning_base(name):
        return retrieve_model(host, base).model_copy(update={"id": name})
    how = f"fetch it with `cai pull {name}`" if name in NAMED else "client.models.list() shows what there is"
    raise NotFoundError(f"The model {shown(name)} does not exist: {how}.", param="model", code="model_not_found")


def require_text(model: ResolvedModel) -> None:
    """Refuse a model that does not answer text, one that transcribes speech above all, before its weights are loaded.

    Raises:
        BadRequestError: naming the capability.
    """
    entry = catalog().get(model.name.removesuffix("-r") if model.reasons else model.name)
    hears = is_speech(read_config(model.path))
    if hears or (entry is not None and not entry.capabilities.support_chat_completion):
        instead = " It transcribes speech: client.audio.transcriptions.create." if hears else ""
        raise BadRequestError(
            f"The model {shown(model.name)} can't answer text: it lacks the capability 'support_chat_completion'.{instead}",
            param="model",
            code="chat_not_supported",
        )


def require_speech(model: ResolvedModel) -> None:
    """Refuse a model that does not transcribe speech, before its weights are loaded.

    Raises:
        BadRequestError: naming the capability.
    """
    config = read_config(model.path)
    if config and not is_speech(config):  # without a config.json, opening it says what is wrong
        raise BadRequestError(
            f"The model {shown(model.name)} can't transcribe audio: it lacks the capability 'supports_audio'. "
            "Name a Whisper model, such as whisper-tiny.en, which `cai pull whisper-tiny.en` fetches.",
            param="model",
            code="audio_not_supported",
        )


def _as_model(entry: CatalogEntry) -> Model:
    # The API's own fields ride along as extra fields of OpenAI's type.
    return Model(**dataclasses.asdict(entry))


def _local_model(host: ModelHost, name: str, path: Path) -> Model:
    """With three fields more than the API has: `tools`, "native" if the chat template takes them, "generic" if they are put
    to the model as text, None if it can't chat; `supports_embeddings` and `supports_translation` of `capabilities`."""
    config = read_config(path)
    hears = is_speech(config)
    chats = bool(template_of(path)[0]) and has_head(config) and not hears
    tools = tools_of(path) if chats else None
    capabilities = Capabilities(
        supports_audio=hears,
        supports_image=False,
        supports_function_calling=tools is not None,
        support_chat_completion=chats,
        supports_responses=chats,
    )
    try:
        created = int((path / "config.json").stat().st_mtime)
    except OSError:  # registered, but not there: it stays listed, and opening it says what is wrong
        created = 0
    entry = CatalogEntry(name, created, "local", _parameters_number(path, host.keep), capabilities)
    fields: dict[str, Any] = {**dataclasses.asdict(entry), "tools": tools}
    fields["capabilities"]["supports_embeddings"] = _embeds(path)
    fields["capabilities"]["supports_translation"] = hears and _translates(path)
    return Model(**fields)


def _translates(path: Path) -> bool:
    try:
        return SpeechTokens.from_checkpoint(path).is_multilingual
    except CaiError:  # as of `_parameters_number`
        return False


def _embeds(path: Path) -> bool:
    try:
        return EmbeddingFiles.read(path) is not None
    except (CaiError, OSError):  # as of `_parameters_number`
        return False


def _parameters_number(path: Path, keep: float | None) -> str:
    """Stored parameters: those of every linear module, however it is factorized, and every other tensor's elements. keep: of
    an elastic checkpoint, those that are in use when it is opened so."""
    try:
        with Checkpoint.open(path, keep) as checkpoint:
            others = checkpoint.tensors()
            count = 0
            for name, spec in checkpoint.modules.items():
                count += spec.parameters
                for tensor in spec.tensors(name):
                    others.pop(tensor, None)
            count += sum(math.prod(info.shape) for info in others.values())
    except (CaiError, OSError):  # a listing must not fail for one bad checkpoint; opening it gives the reason
        return UNKNOWN
    return format_parameters(count)
