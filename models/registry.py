"""From config.json's `model_type` to a model definition."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cai_runtime.errors import UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from cai_runtime.kernels.batch import AttentionBatch, GivenEmbeddings
    from cai_runtime.kernels.cache_groups import CacheGroup
    from cai_runtime.layers.linear import WeightLoader

# model_type -> (module of this package, class). One file per architecture.
MODELS = {
    "llama": ("llama", "Llama"),
    "ministral": ("mistral", "Mistral"),
    "mistral": ("mistral", "Mistral"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3"),
    "whisper": ("whisper", "Whisper"),
}


# Architectures of config.json without a language-model head: they give hidden states alone.
HEADLESS = frozenset({"LlamaModel", "MinistralModel", "MistralModel", "Qwen2Model", "Qwen3Model"})


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of this config.json has a language-model head."""
    named = config.get("architectures")
    return not (isinstance(named, (list, tuple)) and named and named[0] in HEADLESS)


SPEECH = frozenset({"whisper"})  # model_types that transcribe audio, and answer no text


def is_speech(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of this config.json transcribes speech."""
    return config.get("model_type") in SPEECH


class CausalLM(Protocol):
    """What the engine asks of a language model.

    One without a head has an attribute `has_head = False`, and neither `logits` nor `step`. One with an attribute `able`
    says there what it takes besides tokens, see `engine.runner.Runner`; with "encoder" it is an `EncoderDecoderLM`.
    """

    vocab_size: int
    max_context: int
    device: torch.device
    dtype: torch.dtype

    def cache_groups(self, page_size: int, dtype: torch.dtype) -> tuple[CacheGroup, ...]:
        """What its layers cache. dtype: of the cache."""
        ...

    def allocate(self, counts: Mapping[str, int], page_size: int, dtype: torch.dtype, max_context: int) -> None:
        """Make the caches: `counts` pages of each group, for sequences of at most `max_context` positions. Groups of one
        pool (`cache_groups.pools`) have the same count and lie in the same memory. Call once, before `forward`."""
        ...

    def copy_pages(self, group: str, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages of a group, by number. No target is a source too."""
        ...

    def forward(self, ids: torch.Tensor, batch: AttentionBatch, given: GivenEmbeddings | None = None) -> torch.Tensor:
        """ids int32 [T] -> hidden states [T, hidden]; keys and values go into the cache. given: rows in place of
        embeddings; the ids there are any."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> fp32 [N, vocabulary]."""
        ...

    def step(
        self, ids: torch.Tensor, wanted: torch.Tensor, batch: AttentionBatch, given: GivenEmbeddings | None = None
    ) -> torch.Tensor:
        """Both: ids int32 [T], wanted int32 [N] rows of them -> fp32 [N, vocabulary]."""
        ...


class EncoderDecoderLM(CausalLM, Protocol):
    """What the engine asks of a model whose decoder attends to an encoder's output, in pages of kind "encoder"."""

    def encode(self, features: Sequence[np.ndarray], pages: np.ndarray) -> None:
        """Put the encoder's output of each input into its pages, int32 [inputs, pages of an output]."""
        ...

    def forward_attending(
        self, ids: torch.Tensor, batch: AttentionBatch, layers: frozenset[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """`forward`, and the queries [T, hidden] of the cross-attention of some layers."""
        ...

    def attention_weights(
        self, layer: int, heads: Sequence[int], queries: torch.Tensor, pages: torch.Tensor
    ) -> np.ndarray:
        """Cross-attention weights of heads of a layer: fp32 [heads, T, rows]. pages: int32, of one output."""
        ...


def build_model(loader: WeightLoader, on_layer: Callable[[], object] = lambda: None) -> CausalLM:
    """The model that the loader's checkpoint describes, its weights loaded.

    Raises UnsupportedModelError for a model_type that has no definition here.
    """
    model_type = loader.checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise UnsupportedModelError(
            f"model_type {model_type!r} of {loader.checkpoint.path} has no definition; known: {known}"
        )
    module, name = MODELS[model_type]
    return getattr(importlib.import_module(f"cai_runtime.models.{module}"), name)(loader, on_layer)
