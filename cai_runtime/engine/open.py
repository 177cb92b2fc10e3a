"""From a checkpoint directory to a running engine."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.engine.tokenizer import load_tokenizer as load_tokenizer  # exported from here
from cai_runtime.engine.turn_ends import end_of_sequence_ids
from cai_runtime.errors import InvalidConfigError, KernelError, MemoryBudgetError
from cai_runtime.options import DTYPES, KV_DTYPES, PREFILL_CHUNK, PREFILL_CHUNK_GPU, EngineOptions

if TYPE_CHECKING:
    import torch

    from cai_runtime.engine.engine import Engine
    from cai_runtime.engine.model_runner import ModelRunner

logger = logging.getLogger("cai_runtime.engine")

PAGE_SIZE = 16


def open_engine(path: str | Path, options: EngineOptions | None = None, /, **more: Any) -> Engine:
    """Open a dense or slim checkpoint directory and start its engine.

    Options, device, configuration and tokenizer are checked before the weights are loaded.

    Args:
        path: the checkpoint directory.
        options: see `EngineOptions`; the same as keywords: `open_engine(path, max_batch=8)`.

    Raises:
        OptionTypeError, OptionValueError: an option has a wrong type or value.
        KeepError: the checkpoint is not elastic, or `keep` is outside its range.
        CheckpointError: the checkpoint is damaged or lacks its tokenizer.
        UnsupportedModelError: this version does not run its architecture.
        KernelError: the device or the backend is not available.
        MemoryBudgetError: `max_context` is beyond the model's, or the KV cache is too small or can't be allocated.
        EngineClosedError: this process was forked from one with an engine.
    """
    from cai_runtime.engine.lifetime import enter_process
    from cai_runtime.slim.reader import Checkpoint

    options = EngineOptions.of(options, **more)
    path = Path(path)
    enter_process()
    place, _ = resolve_place(options)
    options = replace(options, prefill_chunk=prefill_chunk(options, place))
    with Checkpoint.open(path, keep=options.keep) as checkpoint:
        config = checkpoint.config
    tokenizer = load_tokenizer(path)
    eos_token_ids = end_of_sequence_ids(path, config, tokenizer)
    runner, config = load_runner(path, options)
    return start_engine(runner, tokenizer, options, eos_token_ids=eos_token_ids, model_config=config)


def start_engine(runner: ModelRunner, tokenizer: Any, options: EngineOptions, **more: Any) -> Engine:
    """An `Engine` over `runner`. Closes the runner if the engine can't start. more: further arguments of `Engine`."""
    from cai_runtime.engine.engine import Engine

    try:
        return Engine(runner, tokenizer, **options.for_engine(), **more)
    except BaseException:
        runner.close()
        raise


def resolve_place(options: EngineOptions) -> tuple[torch.device, str]:
    """The device and the kernels' backend. Raises KernelError if one is not available."""
    from cai_runtime.kernels.backend import resolve_backend

    place = choose_device(options.device)
    return place, resolve_backend(options.backend, place)


def prefill_chunk(options: EngineOptions, place: torch.device) -> int:
    """The prompt tokens of a step at most: as the options say, else what suits the device."""
    return options.prefill_chunk or (PREFILL_CHUNK_GPU if place.type == "cuda" else PREFILL_CHUNK)


def load_runner(
    path: Path, options: EngineOptions | None = None, /, *, keep_all: bool = False, **more: Any
) -> tuple[ModelRunner, dict[str, Any]]:
    """The model of a checkpoint with its KV cache, and its config.json. With `keep`, the config is that of the checkpoint's
    size at that keep. Arguments and errors as of `open_engine`.

    keep_all: sliding windows keep the pages of all positions, for callers that choose a sequence's pages themselves."""
    import torch

    from cai_runtime.byte_sizes import format_bytes
    from cai_runtime.engine.cache_groups import bytes_for, bytes_held, split_budget, useful_bytes
    from cai_runtime.engine.lifetime import enter_process
    from cai_runtime.engine.memory import cache_budget
    from cai_runtime.engine.model_runner import ModelRunner
    from cai_runtime.layers.linear import WeightLoader
    from cai_runtime.models.registry import build_model
    from cai_runtime.progress import progress_bar
    from cai_runtime.slim.reader import Checkpoint

    options = EngineOptions.of(options, **more)
    enter_process()
    begin = time.monotonic()
    place, kernels = resolve_place(options)
    with Checkpoint.open(path, keep=options.keep) as checkpoint:
        config = checkpoint.config
        _check_context(options.max_context, _stated_positions(config))  # before the weights are loaded
        weights = choose_dtype(options.dtype, config, kernels)
        loader = WeightLoader(
            checkpoint, place, weights, kernels, activations=options.activations,
            cache_dtype=None if options.kv_dtype == "auto" else getattr(torch, KV_DTYPES[options.kv_dtype]),
        )  # fmt: skip
        layers = sum(int(config.get(key) or 0) for key in _layer_counts(config))
        with progress_bar("load", total=layers, unit="layer", show=options.progress) as bar:
            model = build_model(loader, bar.update)
    _check_context(options.max_context, model.max_context)
    cache_dtype = loader.cache_dtype or model.dtype
    context = options.max_context or model.max_context
    groups = model.cache_groups(PAGE_SIZE, cache_dtype)
    if keep_all:
        groups = tuple(replace(g, kind="pages", window=None) if g.kind == "window" else g for g in groups)
    chunk = prefill_chunk(options, place)
    useful = useful_bytes(groups, context, options.max_batch, chunk)
    budget = cache_budget(options.kv_cache, device=str(place), useful=useful)
    counts = split_budget(groups, budget, context, chunk)
    least = bytes_for(groups, 2 * PAGE_SIZE)
    if budget < least:
        page_bytes = sum(group.page_bytes for group in groups)
        raise MemoryBudgetError(
            f"a KV cache of {budget} bytes holds {budget // page_bytes} pages of {page_bytes} bytes: give at least "
            f"{least} bytes"
        )
    on_gpu = kernels in ("triton", "cuda") and place.type == "cuda"
    try:
        runner = ModelRunner(
            model,
            groups,
            counts,
            cache_dtype=cache_dtype,
            max_context=options.max_context,
            cuda_graphs=(on_gpu if options.cuda_graphs is None else options.cuda_graphs) and _records(config),
            max_batch=options.max_batch,
        )
        runner.activations = "int8" if loader.rounds() else "fp32"
    except (torch.OutOfMemoryError, OSError, MemoryError) as e:
        raise MemoryBudgetError(
            f"a KV cache of {budget} bytes can't be allocated: give a smaller kv_cache ({e})"
        ) from e
    held = ", ".join(f"{counts[g.name] * PAGE_SIZE} positions" + f" of {g.name!r}" * (len(groups) > 1) for g in groups)
    logger.info(
        "loaded %s in %.1f s: %s, %s kernels, KV cache of %s for %s",
        path, time.monotonic() - begin, place, kernels, format_bytes(bytes_held(groups, counts)), held,
    )  # fmt: skip
    try:
        runner.record_graphs(options.progress)  # now, so that no request waits for it
    except BaseException:
        runner.close()
        raise
    return runner, config


def _layer_counts(config: dict[str, Any]) -> tuple[str, ...]:
    """The keys of config.json that say how many layers are loaded."""
    return ("encoder_layers", "decoder_layers") if config.get("is_encoder_decoder") else ("num_hidden_layers",)


def _records(config: dict[str, Any]) -> bool:
    """Whether the model's decode steps can be CUDA graphs."""
    from cai_runtime.models.registry import has_head

    return has_head(config) and not config.get("is_encoder_decoder")


def _stated_positions(config: dict[str, Any]) -> int | None:
    """The context that config.json states. None if only the model can tell: dynamic RoPE has more positions than
    max_position_embeddings says, and an impossible value is the model's to refuse."""
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := config.get(key), dict) and "dynamic" in (rope.get("rope_type"), rope.get("type")):
            return None
    positions = config.get("max_target_positions" if config.get("is_encoder_decoder") else "max_position_embeddings")
    return positions if isinstance(positions, int) and positions > 0 else None


def _check_context(wanted: int | None, most: int | None) -> None:
    """Raise MemoryBudgetError for a `max_context` beyond the model's. most: the model's; None: unknown."""
    if wanted is not None and most is not None and wanted > most:
        raise MemoryBudgetError(f"max_context {wanted} is more than the model's {most} positions: give at most {most}")


def choose_device(device: str) -> torch.device:
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise KernelError(f'device {device!r} is not one of "auto", "cpu", "cuda", "cuda:N"') from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise KernelError(f"device {device!r}: torch sees no GPU here")
    if chosen.type not in ("cpu", "cuda"):
        raise KernelError(f'device {device!r} is not supported; use "cpu" or "cuda"')
    return chosen


def named_dtype(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES:
        raise InvalidConfigError(f"dtype {name!r} is not one of auto, fp32, bf16, fp16")
    return getattr(torch, DTYPES[name])


def choose_dtype(dtype: str, config: dict[str, Any], backend: str) -> torch.dtype | None:
    """The dtype of float weights. None: as stored."""
    if dtype != "auto":
        return named_dtype(dtype)
    if backend == "cpu":
        return None
    from cai_runtime.layers.linear import stored_dtype

    return stored_dtype(config)
