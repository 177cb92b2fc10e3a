"""How good a model is, and how like another: perplexity, and agreement of next-token distributions.

A "model" here is anything that gives logits: a transformers model, or a callable from token ids, int64 [batch, tokens],
to logits [batch, tokens, vocabulary].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cai_runtime.convert.cache import tqdm_disable
from cai_runtime.errors import CompressionError, TensorMissingError, UnsupportedModelError
from cai_runtime.stock.guard import foreign, quiet_transformers

Logits = Callable[[torch.Tensor], torch.Tensor]


SPEECH = {"whisper"}  # model types that are loaded as speech recognizers, everything else as causal language models


@dataclass(frozen=True)
class Agreement:
    """Of `model` with `reference`. top1: share of positions with the same most likely token. kl: mean Kullback-Leibler
    divergence KL(reference || model), in nats per position. tokens: positions compared."""

    top1: float
    kl: float
    tokens: int


@torch.inference_mode()
def perplexity(
    model: Any,
    token_ids: Sequence[int] | torch.Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    batch_size: int = 4,
    progress: bool | None = None,
) -> float:
    """exp of the mean negative log likelihood, in nats, of each token given those before it in its window.

    token_ids: one text, [tokens]. window: tokens the model sees at once. stride: from one window's start to the next
    (default: `window`, windows that do not overlap, of which the first token is not scored; less: every token is scored
    once, with at least `window - stride` tokens before it).

    Raises CompressionError for fewer than two tokens or an impossible stride.
    """
    stride = window if stride is None else stride
    if not 0 < stride <= window or window < 2:
        raise CompressionError(f"stride {stride} must lie in 1 .. window, and window {window} be at least 2")
    ids = _row(token_ids)
    total, count = 0.0, 0
    compute = logits_of(model)
    batches = list(_batches(ids, window, stride, batch_size))
    for batch, scored_from in tqdm(batches, desc="perplexity", unit="batch", disable=tqdm_disable(progress)):
        logits = compute(batch)[:, scored_from - 1 : -1].float()
        targets = batch[:, scored_from:].to(logits.device)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    return math.exp(total / count)


@torch.inference_mode()
def agreement(
    reference: Any,
    model: Any,
    token_ids: Sequence[int] | torch.Tensor,
    *,
    window: int = 512,
    batch_size: int = 1,
    progress: bool | None = None,
) -> Agreement:
    """Compare two models' next-token distributions at every position of a text cut into windows. Arguments as in
    `perplexity`."""
    ids = _row(token_ids)
    same, divergence, count = 0, 0.0, 0
    batches = list(_batches(ids, window, window, batch_size))
    first, second = logits_of(reference), logits_of(model)
    for batch, _ in tqdm(batches, desc="agreement", unit="batch", disable=tqdm_disable(progress)):
        p = first(batch).float().log_softmax(-1)
        q = second(batch).to(p.device).float().log_softmax(-1)
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        divergence += float((p.exp() * (p - q)).sum())
        count += batch.numel()
    return Agreement(same / count, divergence / count, count)


def logits_of(model: Any) -> Logits:
    """The model as a function from token ids [batch, tokens] to logits."""
    if isinstance(model, torch.nn.Module) and hasattr(model, "config"):
        device = next(model.parameters()).device
        return lambda ids: model(input_ids=ids.to(device), use_cache=False).logits
    return model


def _row(token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    ids = torch.as_tensor(token_ids, dtype=torch.int64)
    if ids.ndim != 1 or ids.numel() < 2:
        raise CompressionError(f"a text of at least two token ids is needed, not a tensor of shape {list(ids.shape)}")
    return ids


def _batches(ids: torch.Tensor, window: int, stride: int, batch_size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Windows [batch, tokens] and the first position in them that is scored. A last window may be shorter."""
    first = ids[:window]
    yield first[None], 1
    # Every further window scores what the one before did not reach: its last `stride` tokens, or, where windows do not
    # overlap, all but its first one.
    scored_from = max(window - stride, 1)
    starts = range(stride, ids.numel() - window + 1, stride)
    for k in range(0, len(starts), batch_size):
        yield torch.stack([ids[s : s + window] for s in starts[k : k + batch_size]]), scored_from
    rest = ids[(starts[-1] if starts else 0) + stride :] if ids.numel() > window else ids[:0]
    if rest.numel() > scored_from:
        yield rest[None], scored_from


def dense_reference(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The dense checkpoint as stock transformers' model, in evaluation mode, its parameters frozen.

    Raises CompressionError when transformers can't load it, TensorMissingError when it would draw tensors at random,
    UnsupportedModelError as `auto_class`.
    """
    from transformers import AutoConfig

    with _loading(path):
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model, found = auto_class(config).from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    _require_all(path, found)
    return _frozen(model, device)


def slim_as_transformers(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", keep: float | None = None
) -> Any:
    """A slim checkpoint as stock transformers' model: every module multiplied out to its dense matrix. The judge of a
    slim model's quality, not a way to run it: it holds the dense model. keep: of an elastic checkpoint.

    Raises CheckpointError for a checkpoint that can't be read or lacks a tensor, CompressionError when transformers can't
    build the model.
    """
    from transformers import GenerationConfig

    from cai_runtime.slim.reader import Checkpoint

    with Checkpoint.open(path, keep=keep) as checkpoint:
        owned = {tensor for name in checkpoint.modules for tensor in checkpoint.module_tensors(name)}
        state = {
            name: (tensor.to(dtype) if (tensor := checkpoint.tensor(name)).is_floating_point() else tensor).clone()
            for name in checkpoint.tensors()
            if name not in owned
        }
        for name in checkpoint.modules:
            module = checkpoint.module(name)
            state[f"{name}.weight"] = module.dense(torch.float32).to(dtype)
            if module.bias is not None:
                state[f"{name}.bias"] = module.bias.to(dtype)
    with _loading(path):
        config = dense_config(path)
        with torch.device("meta"):  # only to learn the class; nothing is allocated
            architecture = type(auto_class(config).from_config(config))
        model, found = architecture.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        if (Path(path) / "generation_config.json").exists():  # without a path transformers makes one up
            model.generation_config = GenerationConfig.from_pretrained(path)
    _require_all(path, found)
    return _frozen(model, device)


def dense_config(path: str | Path) -> Any:
    """A checkpoint's config.json as transformers has it, as that of a dense model. Raises what transformers raises."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def auto_class(config: Any) -> Any:
    """transformers' class that loads models of this configuration: `SPEECH`, causal language models, and what answers text
    and images with text.

    Raises UnsupportedModelError when it has none for it.
    """
    import transformers

    if config.model_type in SPEECH:
        return transformers.AutoModelForSpeechSeq2Seq
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    names = ", ".join(getattr(config, "architectures", None) or []) or "no architecture"
    raise UnsupportedModelError(
        f"transformers {transformers.__version__} has no model that predicts text for model_type {config.model_type!r} "
        f"({names}). Of a larger model, save the language model as a checkpoint of its own, and take that"
    )


def _frozen(model: Any, device: str) -> Any:
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def _loading(path: str | Path) -> Iterator[None]:
    with foreign(f"transformers can't load {path} as a language or speech model"), quiet_transformers():
        yield


def _require_all(path: str | Path, found: dict[str, Any]) -> None:
    """found: transformers' loading info."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise TensorMissingError(
            f"the checkpoint does not have {len(missing)} of the tensors that its config.json's model has, such as this one",
            file=path,
            tensor=missing[0],
        )
