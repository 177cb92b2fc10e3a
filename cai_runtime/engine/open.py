"""From a checkpoint directory to a running engine."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import InvalidConfigError, KernelError, MemoryBudgetError, MissingFileError

if TYPE_CHECKING:
    import torch

    from cai_runtime.engine.engine import Engine
    from cai_runtime.engine.model_runner import ModelRunner

logger = logging.getLogger("cai_runtime.engine")

PAGE_SIZE = 16
DTYPES = {
    "fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16",
    "float16": "float16",
}  # fmt: skip


def open_engine(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    keep: float | None = None,
    kv_cache: int | float | str | None = None,
    kv_dtype: str = "auto",
    max_context: int | None = None,
    max_batch: int = 64,
    backend: str | None = None,
    int8_activations: bool = False,
    cuda_graphs: bool | None = None,
    progress: bool | None = None,
    **engine_options: Any,
) -> Engine:
    """Open a dense or slim checkpoint directory and start its engine.

    device: "cpu", "cuda", "cuda:1" or "auto" (a GPU if torch sees one). dtype: "fp32", "bf16", "fp16" or "auto": what
    float weights are held in; "auto" keeps them as stored on the CPU, whose kernels convert in registers and compute in
    fp32, and elsewhere takes the checkpoint's own dtype. keep: of an elastic checkpoint, the share of its parameters to
    open, at most; None: the largest. kv_cache: budget of the KV cache, see `memory.cache_budget`.
    kv_dtype: of the cached keys and values; "auto" is the activations'. max_context: at most the model's. max_batch:
    sequences decoded together. backend: kernels to use, see `kernels.backend`. int8_activations: round the inputs of
    int8 cores to int8 (W8A8): faster prefill, and a loss of accuracy that hangs on the model; the head is left out.
    cuda_graphs: record decode steps as CUDA graphs; None: where there is a GPU. engine_options: passed to `Engine`.

    Raises CheckpointError (the checkpoint is damaged), KeepError (it is not elastic, or does not open at `keep`), TypeError
    (`keep` is no number), UnsupportedModelError, MemoryBudgetError (not one sequence fits),
    KernelError (the device or backend is not there).
    """
    from cai_runtime.engine.engine import Engine

    path = Path(path)
    runner, config = load_runner(
        path,
        device=device,
        dtype=dtype,
        keep=keep,
        kv_cache=kv_cache,
        kv_dtype=kv_dtype,
        max_context=max_context,
        max_batch=max_batch,
        backend=backend,
        int8_activations=int8_activations,
        cuda_graphs=cuda_graphs,
        progress=progress,
    )
    tokenizer = load_tokenizer(path)
    return Engine(
        runner,
        tokenizer,
        eos_token_ids=end_of_sequence_ids(path, config, tokenizer),
        model_config=config,
        max_batch=max_batch,
        **engine_options,
    )


def load_runner(
    path: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    keep: float | None = None,
    kv_cache: int | float | str | None = None,
    kv_dtype: str = "auto",
    max_context: int | None = None,
    max_batch: int = 64,
    backend: str | None = None,
    int8_activations: bool = False,
    cuda_graphs: bool | None = None,
    progress: bool | None = None,
) -> tuple[ModelRunner, dict[str, Any]]:
    """The model of a checkpoint with its KV cache, and its config.json (at `keep`: that of the smaller checkpoint, whose
    modules are the ones in use). See `open_engine`."""
    import torch

    from cai_runtime.engine.lifetime import enter_process
    from cai_runtime.engine.memory import cache_budget, format_bytes
    from cai_runtime.engine.model_runner import ModelRunner
    from cai_runtime.kernels.backend import resolve_backend
    from cai_runtime.layers.linear import WeightLoader
    from cai_runtime.models.registry import build_model
    from cai_runtime.progress import progress_bar
    from cai_runtime.slim.reader import Checkpoint

    enter_process()
    begin = time.monotonic()
    place = choose_device(device)
    kernels = resolve_backend(backend, place)
    with Checkpoint.open(path, keep=keep) as checkpoint:
        config = checkpoint.config
        weights = choose_dtype(dtype, config, kernels)
        loader = WeightLoader(checkpoint, place, weights, kernels, int8_activations=int8_activations)
        layers = int(config.get("num_hidden_layers") or 0)
        with progress_bar("load", total=layers, unit="layer", show=progress) as bar:
            model = build_model(loader, bar.update)
    cache_dtype = model.dtype if kv_dtype == "auto" else named_dtype(kv_dtype)
    if max_context is not None and not 1 <= max_context <= model.max_context:
        raise MemoryBudgetError(f"max_context {max_context} is outside the model's 1 to {model.max_context} positions")
    context = max_context or model.max_context
    page_bytes = model.page_bytes(PAGE_SIZE, cache_dtype)
    useful = page_bytes * (-(-context // PAGE_SIZE)) * max_batch
    budget = cache_budget(kv_cache, device=str(place), useful=useful)
    pages = budget // page_bytes
    if pages < 2:
        raise MemoryBudgetError(
            f"a KV cache of {budget} bytes holds {pages} pages of {page_bytes} bytes: give at least {2 * page_bytes} bytes"
        )
    try:
        runner = ModelRunner(
            model,
            num_pages=pages,
            page_size=PAGE_SIZE,
            cache_dtype=cache_dtype,
            max_context=max_context,
            cuda_graphs=kernels in ("triton", "cuda") and place.type == "cuda" if cuda_graphs is None else cuda_graphs,
            max_batch=max_batch,
        )
    except (torch.OutOfMemoryError, OSError, MemoryError) as e:
        raise MemoryBudgetError(
            f"a KV cache of {budget} bytes can't be allocated: give a smaller kv_cache ({e})"
        ) from e
    logger.info(
        "loaded %s in %.1f s: %s, %s kernels, KV cache of %s for %d positions",
        path, time.monotonic() - begin, place, kernels, format_bytes(pages * page_bytes), pages * PAGE_SIZE,
    )  # fmt: skip
    try:
        runner.record_graphs(progress)  # now, and not in the middle of serving
    except BaseException:
        runner.close()
        raise
    return runner, config


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
    """Float weights' dtype; None keeps them as stored."""
    if dtype != "auto":
        return named_dtype(dtype)
    if backend == "cpu":
        return None
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return named_dtype(stored if stored in DTYPES else "float32")


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer, by transformers, without running code of the checkpoint's."""
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise MissingFileError("the checkpoint has no tokenizer (tokenizer.json)", file=path)
    try:
        return tokenizer_class(path).from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as e:  # transformers raises whatever its code stumbles over in a damaged file
        raise InvalidConfigError(f"the tokenizer can't be read: {e}", file=path) from e


def tokenizer_class(path: Path) -> Any:
    """AutoTokenizer, or the generic class of a tokenizer.json where AutoTokenizer would come to that too: on its way it
    imports modelling code, which takes longer than everything else at opening a small model."""
    config = path / "tokenizer_config.json"
    if (path / "tokenizer.json").exists() and config.exists():
        with contextlib.suppress(json.JSONDecodeError, AttributeError):
            if json.loads(config.read_text()).get("tokenizer_class") in (
                "TokenizersBackend",
                "PreTrainedTokenizerFast",
            ):
                from transformers import PreTrainedTokenizerFast

                return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def end_of_sequence_ids(path: Path, config: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a text: of generation_config.json, else config.json, and the tokenizer's own."""
    found: set[int] = set()
    generation = path / "generation_config.json"
    try:
        stated = json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None
    except (json.JSONDecodeError, AttributeError) as e:
        raise InvalidConfigError(f"not a JSON object: {e}", file=generation) from e
    if stated is None:
        stated = config.get("eos_token_id")
    for token in stated if isinstance(stated, list) else [stated]:
        if isinstance(token, int):
            found.add(token)
    if isinstance(tokenizer.eos_token_id, int):
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(found))
