"""The endpoint /embeddings: checks a request, tokenizes its inputs, and builds the reply."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Required

import numpy as np
from openai.types import CreateEmbeddingResponse, Embedding
from openai.types.create_embedding_response import Usage
from pydantic import Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from cai_runtime.api.errors import BadRequestError, as_api_errors, invalid
from cai_runtime.api.generation import Generation
from cai_runtime.api.host import ResolvedModel
from cai_runtime.api.open_model import OpenModel
from cai_runtime.api.params import STRICT, validated
from cai_runtime.api.usage import ReplyHead
from cai_runtime.api.values import Ignored, ModelName, Prompts, Seconds, Whole
from cai_runtime.engine.request import Finished, Request, SamplingParams
from cai_runtime.errors import CheckpointError, UnsupportedModelError
from cai_runtime.scalars import shown
from cai_runtime.slim.embedding_files import EmbeddingFiles

_HOW = (
    "its directory needs the files of the sentence-transformers package: modules.json with the steps Transformer, Pooling "
    "and, optionally, Normalize, and 1_Pooling/config.json with pooling_mode_mean_tokens or pooling_mode_lasttoken"
)


@with_config(STRICT)
class EmbeddingParams(TypedDict, total=False):
    """Keyword arguments of `embeddings.create`.

    input: a text, a list of texts, token ids, or a list of token ids; none of them empty. A text gets the tokenizer's own
        start and end tokens, token ids are taken as they are.
    model: a name given with `Client(models=...)`, or a checkpoint directory. Default: the client's.
    dimensions: at least 1, at most the model's hidden size: the vector's first numbers, normalized again where the model
        normalizes. Of use for models that were trained for it (Matryoshka), which few files tell: a model whose config.json
        has `matryoshka_dimensions` takes these alone. Default: all.
    encoding_format: "float" (default), or "base64": of little-endian fp32.
    prompt_name: a prompt of the model's config_sentence_transformers.json, which is put before each text. Default: none,
        also where the file names a default.
    user: accepted for compatibility; a label with no effect.
    timeout, extra_headers, extra_query, extra_body: as in chat.
    """

    input: Required[Prompts]
    model: ModelName | None
    dimensions: Annotated[Whole, Field(ge=1)] | None
    encoding_format: Literal["float", "base64"] | None
    prompt_name: str | None
    user: str | None
    timeout: Seconds | None
    extra_headers: Ignored | None
    extra_query: Ignored | None
    extra_body: dict[str, Any] | None


_ADAPTER: TypeAdapter[Any] = TypeAdapter(EmbeddingParams)
_NAMES = frozenset(EmbeddingParams.__annotations__)


class Base64Embedding(Embedding):
    """An embedding as the base64 of its numbers, little-endian fp32; OpenAI's type says a list of floats."""

    embedding: str  # type: ignore[assignment]


class EmbeddingReply(CreateEmbeddingResponse):
    """The embeddings of a request, in the order of its inputs."""

    data: list[Embedding | Base64Embedding]  # type: ignore[assignment]


@dataclass(frozen=True)
class EmbeddingRequest:
    """A checked call. `params` holds what was given, of the right types and ranges."""

    model: str | None
    inputs: Sequence[str | list[int]]
    params: Mapping[str, Any]
    stream: bool = False

    def place(self, index: int) -> str:
        """Of an input, for errors."""
        return "input" if len(self.inputs) == 1 else f"input[{index}]"


def parse(params: Mapping[str, Any]) -> EmbeddingRequest:
    """Check a call before anything is loaded.

    Raises:
        BadRequestError: naming the parameter at fault.
    """
    rest = validated(_ADAPTER, params, names=_NAMES, unsupported={})
    request = EmbeddingRequest(rest.pop("model", None), rest.pop("input"), rest)
    for i, given in enumerate(request.inputs):
        if not given:
            raise invalid(request.place(i), "must not be empty")
        if rest.get("prompt_name") is not None and not isinstance(given, str):
            raise invalid("prompt_name", f"can't be used where '{request.place(i)}' is token ids: it goes before texts")
    return request


def prepare(request: EmbeddingRequest, model: ResolvedModel, opened: OpenModel) -> Generation[Any, EmbeddingReply]:
    """Tokenize the inputs.

    Raises:
        BadRequestError: the model's files don't say how it makes embeddings, an input names a token that the model does not
            have or does not fit the context, or the model has no such dimensions or prompt.
    """
    files = _files(model.name, opened)
    size = _dimensions(request.params.get("dimensions"), files, opened)
    prompt = _prompt(request.params.get("prompt_name"), files)
    head = ReplyHead.new("embd", model.name)
    nothing = SamplingParams(max_tokens=0)
    requests = [
        Request(_encode(prompt, given, request.place(i), opened), nothing, f"{head.id}/{i}", pooling=files.pooling)
        for i, given in enumerate(request.inputs)
    ]
    as_text = request.params.get("encoding_format") == "base64"
    return Generation(requests, EmbeddingFormat(model.name, size, files.normalize, as_text))


def _files(name: str, opened: OpenModel) -> EmbeddingFiles:
    try:
        files = opened.embedding_files
    except (CheckpointError, UnsupportedModelError) as error:
        raise _refused(f"The model {shown(name)} can't make embeddings: {error}.") from error
    if files is None:
        raise _refused(
            f"The model {shown(name)} can't make embeddings: it lacks the capability 'supports_embeddings': its files "
            f"name no pooling. If it was trained for that, {_HOW}."
        )
    return files


def _dimensions(given: int | None, files: EmbeddingFiles, opened: OpenModel) -> int | None:
    if given is None:
        return None
    most = opened.engine.model_config.get("hidden_size")
    if isinstance(most, int) and given > most:
        raise invalid("dimensions", f"must be at most {most}, the model's own, got {given}")
    if files.dimensions is not None and given not in (*files.dimensions, most):
        can = ", ".join(map(str, files.dimensions)) or "its own alone"
        raise invalid("dimensions", f"must be one that the model was trained for, {can}, got {given}")
    return given


def _prompt(name: str | None, files: EmbeddingFiles) -> str:
    if name is None:
        return ""
    if name not in files.prompts:
        known = ", ".join(map(repr, files.prompts)) or "none"
        raise invalid("prompt_name", f"must be the name of a prompt of the model, {known}, got {shown(name)}")
    if not files.pools_prompt and files.pooling == "mean":
        raise invalid(
            "prompt_name", "can't be used: this model leaves a prompt's tokens out of the mean (include_prompt)"
        )
    return files.prompts[name]


def _encode(prompt: str, given: str | list[int], place: str, opened: OpenModel) -> list[int]:
    """Token ids of an input. Raises BadRequestError naming it."""
    engine = opened.engine
    if isinstance(given, str):
        text = prompt + given
        opened.check_characters(len(text), place)
        with opened.tokenizer_lock, as_api_errors():
            ids = list(
                opened.tokenizer.encode(text, verbose=False)
            )  # no warning about its length: that is checked here
        if not ids:
            raise invalid(place, "has no tokens")
    else:
        ids = given
        if (highest := max(ids)) >= engine.vocab_size:
            raise invalid(place, f"holds token {highest}, but this model's token ids end at {engine.vocab_size - 1}")
    if len(ids) > engine.max_context:
        raise BadRequestError(
            f"'{place}' has {len(ids)} tokens, but {engine.context_limit}. Shorten it, or embed it in parts.",
            param=place,
            code="context_length_exceeded",
        )
    return ids


class EmbeddingFormat:
    """Builds the reply from the pooled hidden states.

    Args:
        size: the numbers of a vector to keep; None: all.
        normalize: to length 1.
        as_text: base64 instead of lists.
    """

    def __init__(self, model: str, size: int | None, normalize: bool, as_text: bool):
        self._model, self._size, self._normalize, self._as_text = model, size, normalize, as_text

    def opening(self) -> list[Any]:
        return []

    def chunks(self, index: int, event: Any, logprobs: Any = None) -> list[Any]:
        return []

    def closing(self, choices: Sequence[Finished]) -> list[Any]:
        return []

    def fold(self, choices: Sequence[Finished]) -> EmbeddingReply:
        tokens = sum(done.prompt_tokens for done in choices)
        return EmbeddingReply(
            object="list",
            model=self._model,
            data=[self._entry(i, self._vector(done)) for i, done in enumerate(choices)],
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        )

    def _vector(self, done: Finished) -> np.ndarray:
        """fp32, cut and normalized."""
        assert done.embedding is not None
        vector = done.embedding[: self._size]
        if self._normalize and (length := np.sqrt(np.sum(vector * vector))):
            vector = vector / length
        return vector.astype("<f4")

    def _entry(self, index: int, vector: np.ndarray) -> Embedding | Base64Embedding:
        if self._as_text:
            return Base64Embedding(
                object="embedding", index=index, embedding=base64.b64encode(vector.tobytes()).decode("ascii")
            )
        return Embedding(object="embedding", index=index, embedding=vector.tolist())


def _refused(message: str) -> BadRequestError:
    return BadRequestError(message, param="model", code="embeddings_not_supported")
