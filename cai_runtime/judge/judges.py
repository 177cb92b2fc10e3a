"""What computes the logits when checkpoints are compared: stock transformers on the dense reconstruction, or the
engine.

transformers in fp32 is the exact judge of what a checkpoint says; the engine is what its users run, with its kernels'
own roundings, and needs no dense matrix in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self, get_args

import torch

from cai_runtime.errors import CompressionError
from cai_runtime.judge.evaluate import logits_of
from cai_runtime.stock.cached_forward import cached_forward
from cai_runtime.stock.load import dense_reference, slim_as_transformers

if TYPE_CHECKING:
    pass

Backend = Literal["transformers", "engine"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
ENGINE_SEQUENCES = 8  # sequences whose cache the engine gets memory for
PROMPT_CHUNK = 2048  # tokens that the engine is fed at a time


class Judge(Protocol):
    """A model that can be asked for its logits and for its greedy continuation."""

    max_context: int

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [tokens] -> fp32 [tokens, vocabulary] on the model's device: row t is what follows tokens 0 .. t."""
        ...

    def continue_greedily(self, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
        """The most likely next token, up to `max_tokens` times, until one that ends a text (which is left out)."""
        ...

    def close(self) -> None:
        """Give the weights' memory back. Idempotent."""
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
    """A checkpoint, dense or slim, opened to be judged.

    backend: "transformers" multiplies every module out to its dense matrix; "engine" runs the checkpoint as `Client`
    does. device: as `Client`'s. dtype: "fp32", "bf16", "fp16"; "auto" is fp32 for transformers, and the engine's own
    "auto" for it. keep: of an elastic checkpoint. engine_options: of `EngineOptions`, for the engine alone.

    Raises CompressionError, CheckpointError, UnsupportedModelError, KernelError, MemoryBudgetError.
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
    """Stock transformers' model in memory, dense, in `dtype` (default fp32)."""

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
        gc.collect()  # transformers' modules refer to each other


class EngineJudge(_Closing):
    """The engine's model, with a cache for a few sequences. Its logits, and an engine over the same weights to generate
    with.

    The cache is the engine's: logits may be asked for only while no request runs.
    """

    def __init__(self, path: str | Path, **options: Any):
        """options: of `EngineOptions`; `max_batch` is 8 by default. CUDA graphs and the prefix cache are off."""
        from cai_runtime.engine.open import load_runner, load_tokenizer, start_engine
        from cai_runtime.engine.turn_ends import end_of_sequence_ids
        from cai_runtime.options import EngineOptions

        path = Path(path)
        # A prefix kept for later would be overwritten by `logits`.
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
        """The rows of `logits` from position `first` on, at most `LOGIT_ROWS` at a time: all of a long text at a large
        vocabulary would be gigabytes."""
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
        """For each (token ids, n): the log probability, in nats, of all tokens from position n >= 1 on given those
        before them, and whether greedy decoding would have chosen each. Short texts share a pass; none depends on the
        others. The last token is predicted and not read, so that a text may be one longer than the context.

        Raises CompressionError for n = 0, a text that is too long, or an id outside the vocabulary.
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
            asked.append(_Asked(k, ids[:-1], first - 1, ids[first:]))
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


class _Asked(NamedTuple):
    """A text to score: its place in the caller's list, the tokens that are fed, the first of them whose logits are
    wanted, and the tokens that follow from there on."""

    place: int
    fed: list[int]
    first: int
    wanted: list[int]


def _packed(texts: list[_Asked], pages: Callable[[_Asked], int], room: int) -> Iterator[list[_Asked]]:
    """Runs of texts, in their order, that fit into `room` pages together; a longer one is by itself."""
    group: list[_Asked] = []
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
    """Summed log probability of the tokens that follow each row, and whether all are the most likely ones."""
    total, greedy, at = 0.0, True, 0
    for rows in logits:
        wanted = torch.tensor(token_ids[at : at + len(rows)], device=rows.device)
        total += float(rows.log_softmax(-1).gather(1, wanted[:, None]).double().sum())
        greedy = greedy and bool((rows.argmax(-1) == wanted).all())
        at += len(rows)
    return total, greedy
