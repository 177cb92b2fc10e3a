"""Computes logits and greedy answers for comparisons: by stock transformers on dense matrices, or by the engine.

Transformers in fp32 is exact. The engine is what users run: its results include its kernels' roundings, and it needs no
dense matrix in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self, get_args

import torch

from cai_runtime.errors import CompressionError
from cai_runtime.judge.evaluate import logits_of
from cai_runtime.stock.cached_forward import cached_forward
from cai_runtime.stock.load import dense_reference, slim_as_transformers

Backend = Literal["transformers", "engine"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
ENGINE_SEQUENCES = 8  # default max_batch of the engine, which sizes its KV cache
PROMPT_CHUNK = 2048  # tokens of one pass


class Judge(Protocol):
    """A loaded model that computes logits and greedy continuations. A context manager that closes it."""

    max_context: int

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [tokens] -> fp32 [tokens, vocabulary] on the model's device; row t predicts token t + 1."""
        ...

    def continue_greedily(self, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy decoding of up to `max_tokens` tokens. An end token stops it and is not returned."""
        ...

    def close(self) -> None:
        """Free the weights. Idempotent."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_judge(
    path: str | Path,
    backend: Backend = "transformers",
    *,
    device: str = "auto",
    dtype: str = "auto",
    keep: float | None = None,
    progress: bool | None = None,
    **engine_options: Any,
) -> Judge:
    """Load a checkpoint, dense or slim, as a judge.

    Args:
        backend: "transformers" multiplies every module out to its dense matrix; "engine" runs the model as `Client` does.
        device: as `Client` takes it.
        dtype: "fp32", "bf16" or "fp16"; "auto" is fp32 for transformers, and `EngineOptions`' "auto" for the engine.
        keep: the keep at which to open an elastic checkpoint; None: its largest.
        engine_options: further fields of `EngineOptions`, for the engine only.

    Raises:
        CompressionError: an unknown backend, an engine option for transformers, or transformers can't load the model.
        CheckpointError, UnsupportedModelError, KernelError, MemoryBudgetError: the checkpoint can't be read or run.
    """
    if backend == "transformers":
        if engine_options:
            raise CompressionError(f"{', '.join(engine_options)}: only for --backend engine")
        return TransformersJudge(path, device=device, dtype=dtype, keep=keep)
    if backend == "engine":
        return EngineJudge(path, device=device, dtype=dtype, keep=keep, progress=progress, **engine_options)
    raise CompressionError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")


class _Closing:
    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TransformersJudge(_Closing):
    """Stock transformers' dense model in `dtype` (default fp32)."""

    def __init__(self, path: str | Path, *, device: str = "auto", dtype: str = "auto", keep: float | None = None):
        from cai_runtime.engine.open import choose_device, load_tokenizer, named_dtype
        from cai_runtime.engine.turn_ends import end_of_sequence_ids
        from cai_runtime.slim.reader import Checkpoint

        path = Path(path)
        place = choose_device(device)
        wanted = torch.float32 if dtype == "auto" else named_dtype(dtype)
        with Checkpoint.open(path, keep=keep) as checkpoint:
            is_slim, config = checkpoint.is_slim, checkpoint.config
        self._eos = set(end_of_sequence_ids(path, config, load_tokenizer(path)))
        if is_slim:
            self._model: Any = slim_as_transformers(path, dtype=wanted, device=str(place), keep=keep)
        else:
            self._model = dense_reference(path, dtype=wanted, device=str(place))
        self._device = place
        self._logits: Callable[[torch.Tensor], torch.Tensor] | None = logits_of(self._model)
        self.max_context = int(getattr(self._model.config, "max_position_embeddings", None) or 1 << 30)

    @torch.inference_mode()
    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._logits is None:
            raise RuntimeError("the judge is closed")
        return self._logits(token_ids[None])[0].float()

    @torch.inference_mode()
    def continue_greedily(self, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
        found: list[int] = []
        feed, past = torch.tensor([list(prompt_ids)], device=self._device), None
        while len(found) < max_tokens:
            out, past = cached_forward(self._model, past, input_ids=feed)
            token = int(out.logits[0, -1].argmax())
            if token in self._eos:
                break
            found.append(token)
            feed = torch.tensor([[token]], device=self._device)
        return found

    def close(self) -> None:
        self._model = self._logits = None
        gc.collect()  # transformers' modules form reference cycles


class EngineJudge(_Closing):
    """The engine's runner for logits, and an engine over the same weights for generation.

    Both use the engine's KV cache: call `logits` and `log_likelihoods` only while no request runs.
    """

    def __init__(self, path: str | Path, **options: Any):
        """options: fields of `EngineOptions`; `max_batch` is 8 by default. CUDA graphs and the prefix cache are off."""
        from cai_runtime.engine.open import load_runner, load_tokenizer, start_engine
        from cai_runtime.engine.turn_ends import end_of_sequence_ids
        from cai_runtime.options import EngineOptions

        path = Path(path)
        # `logits` writes to pages that a prefix cache would keep.
        fixed = {"cuda_graphs": False, "prefix_cache": False}
        checked = EngineOptions.of({"max_batch": ENGINE_SEQUENCES, **options, **fixed})
        self.tokenizer = load_tokenizer(path)
        self._runner, config = load_runner(path, checked, keep_all=True)
        self._eos = end_of_sequence_ids(path, config, self.tokenizer)
        self.engine = start_engine(self._runner, self.tokenizer, checked, eos_token_ids=self._eos, model_config=config)
        self.max_context = self.engine.max_context

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(self.logits_in_parts(token_ids.tolist())))

    @torch.inference_mode()
    def logits_in_parts(self, token_ids: Sequence[int], first: int = 0) -> Iterator[torch.Tensor]:
        """The rows of `logits` from position `first` on, at most `LOGIT_ROWS` at a time.

        The logits of a whole long text at a large vocabulary would take gigabytes.
        """
        from cai_runtime.engine.model_runner import LOGIT_ROWS
        from cai_runtime.engine.runner import ScheduledSequence

        ids = list(token_ids)
        self._check(ids)
        pages = list(range(self._pages(ids)))
        for start in range(0, len(ids), PROMPT_CHUNK):
            hidden = self._runner.hidden_states(
                [ScheduledSequence(ids[start : start + PROMPT_CHUNK], start, pages, True)]
            )
            for rows in hidden[max(first - start, 0) :].split(LOGIT_ROWS):
                if len(rows):
                    yield self._runner.logits(rows)

    @torch.inference_mode()
    def log_likelihoods(
        self, texts: Sequence[tuple[Sequence[int], int]], on_text: Callable[[], object] = lambda: None
    ) -> list[tuple[float, bool]]:
        """The log likelihood of each text's continuation, and whether greedy decoding would produce it.

        texts: (token ids, n), n >= 1: the continuation is the tokens from position n on. Log likelihoods are sums in nats.
        Short texts share a pass; no text's result depends on the others. The last token is predicted but not fed, so a
        text may be one token longer than the context. on_text: called after each text.

        Raises CompressionError for n < 1, a text that is too long, or an id outside the vocabulary.
        """
        from cai_runtime.engine.runner import ScheduledSequence

        found = [(0.0, True)] * len(texts)
        asked = []
        for k, (token_ids, first) in enumerate(texts):
            ids = list(token_ids)
            if not 1 <= first <= len(ids):
                raise CompressionError(f"a text of {len(ids)} tokens can't be scored from position {first}")
            if first == len(ids):
                on_text()
                continue
            self._check(ids[:-1])
            self._check(ids[-1:])
            asked.append(_ScoredText(k, ids[:-1], first - 1, ids[first:]))
        room = min(self._runner.num_pages, max(PROMPT_CHUNK // self._runner.page_size, 1))
        for group in _packed(asked, lambda text: self._pages(text.fed), room):
            if len(group) == 1:
                parts = [self.logits_in_parts(group[0].fed, group[0].first)]
            else:
                page, step = 0, []
                for text in group:
                    pages = self._pages(text.fed)
                    step.append(ScheduledSequence(text.fed, 0, list(range(page, page + pages)), True))
                    page += pages
                hidden = self._runner.hidden_states(step).split([len(text.fed) for text in group])
                parts = [
                    map(self._runner.logits, rows[text.first :].split(PROMPT_CHUNK))
                    for rows, text in zip(hidden, group, strict=True)
                ]
            for text, logits in zip(group, parts, strict=True):
                found[text.place] = _chosen(logits, text.wanted)
                on_text()
        return found

    def _check(self, ids: list[int]) -> None:
        size = self._runner.vocab_size
        if not 1 <= len(ids) <= self.max_context:
            raise CompressionError(f"a text of {len(ids)} tokens; 1 to {self.max_context} fit this context")
        if not 0 <= min(ids) <= max(ids) < size:
            raise CompressionError(f"token ids {min(ids)} .. {max(ids)}; the vocabulary is 0 .. {size - 1}")

    def _pages(self, ids: Sequence[int]) -> int:
        return -(-len(ids) // self._runner.page_size)

    def continue_greedily(self, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
        from cai_runtime.engine.request import Request, SamplingParams

        room = self.max_context - len(prompt_ids)
        sampling = SamplingParams(max_tokens=min(max_tokens, room), temperature=0.0)
        found = list(self.engine.submit(Request(list(prompt_ids), sampling)).result().token_ids)
        return found[:-1] if found and found[-1] in self._eos else found

    def close(self) -> None:
        self.engine.close()


class _ScoredText(NamedTuple):
    """A text to score.

    place: index in the caller's list. fed: tokens that the model reads. first: first position whose logits are wanted.
    wanted: the tokens that follow each of these positions.
    """

    place: int
    fed: list[int]
    first: int
    wanted: list[int]


def _packed(texts: list[_ScoredText], pages: Callable[[_ScoredText], int], room: int) -> Iterator[list[_ScoredText]]:
    """Split texts, in order, into groups that fit into `room` pages. A text that needs more is a group of its own."""
    group: list[_ScoredText] = []
    used = 0
    for text in texts:
        if group and used + pages(text) > room:
            yield group
            group, used = [], 0
        group.append(text)
        used += pages(text)
    if group:
        yield group


def _chosen(logits: Iterable[torch.Tensor], token_ids: list[int]) -> tuple[float, bool]:
    """(summed log probability of `token_ids`, whether each is its row's most likely token). logits: rows in parts."""
    total, greedy, at = 0.0, True, 0
    for rows in logits:
        wanted = torch.tensor(token_ids[at : at + len(rows)], device=rows.device)
        total += float(rows.log_softmax(-1).gather(1, wanted[:, None]).double().sum())
        greedy = greedy and bool((rows.argmax(-1) == wanted).all())
        at += len(rows)
    return total, greedy
