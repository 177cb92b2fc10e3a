"""Compares checkpoints on text that neither was calibrated on: perplexity, KL divergence, agreement, sizes, samples.

The candidate's distance from the reference is KL(reference || candidate) of the next-token distributions (Kullback and
Leibler 1951), in nats per token, at every position of every window. KL needs one vocabulary for both models; bits per
byte of text compare models without one.

Standard errors are over windows. Between two models they are of paired differences, because a window that is hard for
one model is mostly hard for the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import torch

from cai_runtime.errors import CompressionError
from cai_runtime.judge.comparison_result import Comparison, Divergence, ModelScore, Sample
from cai_runtime.judge.eval_text import Windows, cut_windows, read_text, retokenized, same_tokens
from cai_runtime.judge.judges import Backend, Judge, open_judge
from cai_runtime.judge.stored_logits import ROWS, StoredLogits
from cai_runtime.progress import progress_bar

TOKENS, WINDOW = 8192, 512
SAMPLE_TOKENS = 48
PROMPTS = (
    "Why is the sky blue?",
    "Write a short poem about autumn.",
    "What is 17 plus 25?",
)
QUANTILES = (0.5, 0.9, 0.99)
TOGETHER = 0.5  # both models are loaded at once if they take at most this share of the free memory


def compare(
    reference: str | Path,
    candidate: str | Path | None = None,
    *,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    window: int = WINDOW,
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = SAMPLE_TOKENS,
    backend: Backend = "transformers",
    device: str = "auto",
    dtype: str = "auto",
    together: bool | None = None,
    keep: float | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Judge one checkpoint, or a candidate against a reference. Either may be dense or slim.

    Args:
        reference, candidate: a known name, a URI or a directory (see `cai_runtime.convert.sources.pull`).
        text: a file as `text_files.whole_texts` reads it; None or "wikipedia": the last quarter of the Wikipedia sample.
        tokens: number of tokens to score, about.
        window: tokens per window. Windows are spread evenly over the text; each is scored without the others.
        prompts: both models answer them greedily, through the chat template if there is one.
        max_tokens: of each answer, at most.
        backend: "transformers" (dense matrices in fp32, exact) or "engine" (as users run the model); see `judges`.
        device, dtype: see `judges.open_judge`.
        together: load both models at once. False loads one after the other and stores the reference's log probabilities in
            a temporary file: fp16, 2 bytes per token and vocabulary entry; the rounding moves KL by less than 0.001. None
            is True if both fit into half of the free memory.
        keep: the keep at which to open the candidate, or the only model; that checkpoint must be elastic.
        progress: progress bars on stderr; None shows them on a terminal only.

    Raises:
        SourceError, CheckpointError, UnsupportedModelError: a model can't be fetched, read or run.
        CompressionError: a bad option, a text that can't be used, NaN from a model, or too little room on the disk.
    """
    settings = _Settings(text, tokens, window, prompts, max_tokens, backend, device, dtype, together, progress)
    models = [(reference, None), (candidate, keep)] if candidate is not None else [(reference, keep)]
    return _compared(models, settings)[0]


def compare_keeps(
    reference: str | Path, candidate: str | Path, keeps: Sequence[float | None], **options: Any
) -> list[Comparison]:
    """`compare` of an elastic candidate at each of `keeps` (None: its largest).

    The reference scores the text once and stores its log probabilities in a temporary file. One model is in memory at a
    time. options: those of `compare` except `keep` and `together`. Raises as `compare`.
    """
    settings = _Settings(**options, together=False)
    return _compared([(reference, None), *((candidate, keep) for keep in keeps)], settings)


@dataclass(frozen=True)
class _Settings:
    """The options of `compare` besides the models; see there."""

    text: str | Path | None = None
    tokens: int = TOKENS
    window: int = WINDOW
    prompts: Sequence[str] = PROMPTS
    max_tokens: int = SAMPLE_TOKENS
    backend: Backend = "transformers"
    device: str = "auto"
    dtype: str = "auto"
    together: bool | None = None
    progress: bool | None = None


def _compared(models: Sequence[tuple[str | Path, float | None]], settings: _Settings) -> list[Comparison]:
    """Judge the first model alone, or each other model against it. models: (name, keep)."""
    from cai_runtime.convert.sources import pull
    from cai_runtime.engine.open import choose_device, load_tokenizer

    if settings.prompts and settings.max_tokens < 1:
        raise CompressionError(
            f"max_tokens must be at least 1, is {settings.max_tokens}; without samples, give no prompts"
        )
    if settings.backend not in get_args(Backend):
        raise CompressionError(f"backend must be one of {', '.join(get_args(Backend))}, is {settings.backend!r}")
    found = {name: pull(name, progress=settings.progress) for name, _ in models}
    paths, keeps = [found[name] for name, _ in models], [keep for _, keep in models]
    place = choose_device(settings.device)
    loaded = {path: load_tokenizer(path) for path in dict.fromkeys(paths)}
    tokenizers = [loaded[path] for path in paths]
    document = read_text(settings.text, progress=settings.progress)
    shown = [cut_windows(document, tokenizers[0], tokens=settings.tokens, window=settings.window)]
    alike = len(paths) > 1 and same_tokens(tokenizers[0], tokenizers[1])
    if len(paths) > 1:
        shown += [shown[0] if alike else retokenized(shown[0], tokenizers[0], tokenizers[1])] * (len(paths) - 1)
    together, backend = settings.together, settings.backend
    if together is None:
        together = len(paths) == 2 and sum(_memory(p, backend) for p in paths) <= TOGETHER * _free(place.type)

    def opener(index: int) -> Judge:
        return open_judge(
            paths[index],
            backend,
            device=str(place),
            dtype=settings.dtype,
            keep=keeps[index],
            progress=settings.progress,
        )

    run = _Run(paths, keeps, shown, tokenizers, settings, alike, opener)
    run.run(together)
    scores = [run.score(k) for k in range(len(paths))]
    described = {
        "source": document.source,
        "tokens": shown[0].tokens,
        "window": settings.window,
        "windows": len(shown[0].token_ids),
        "bytes": sum(shown[0].nbytes),
    }
    return [
        Comparison(
            reference=scores[0],
            candidate=scores[k] if k else None,
            divergence=run.divergence(k) if k else None,
            refused=run.refused if k else None,
            text=described,
            backend=backend,
            device=str(place),
            dtype=settings.dtype,
            samples=run.samples(k),
            windows=run.window_means(k),
            position_kl=tuple(kl.numpy() for kl in run.kl[k]),
        )
        for k in (range(1, len(paths)) if len(paths) > 1 else [0])
    ]


def quality(dense: str | Path, slim: str | Path, **options: Any) -> dict[str, Any]:
    """The entry "quality" of a compression report: `compare(dense, slim, **options)` as plain values, without this
    machine's paths and without each window's values."""
    return for_report(compare(dense, slim, **options))


def for_report(comparison: Comparison) -> dict[str, Any]:
    """A comparison of two models as plain values, without paths and each window's values."""
    found = comparison.to_json()
    del found["windows"]
    for model in ("reference", "candidate"):
        del found[model]["path"]
    return found


class _Run:
    """The state of one comparison: each model's scores of each window. Model 0 is the reference."""

    def __init__(
        self,
        paths: list[Path],
        keeps: list[float | None],
        shown: list[Windows],
        tokenizers: list[Any],
        settings: _Settings,
        alike: bool,
        opener: Callable[[int], Judge],
    ):
        self.paths, self.keeps, self.shown, self.tokenizers = paths, keeps, shown, tokenizers
        self.settings, self.opener = settings, opener
        self.refused = None if alike else "the two tokenizers differ: KL and top-1 agreement are of tokens"
        # By model and window, one tensor each:
        self.nats: list[list[torch.Tensor]] = [[] for _ in paths]  # negative log likelihood of each scored token
        self.best: list[list[torch.Tensor]] = [[] for _ in paths]  # most likely token at every position
        self.kl: list[list[torch.Tensor]] = [[] for _ in paths]  # KL from the reference at every position
        self.answers: list[list[list[int]]] = [[] for _ in paths]  # token ids by model and prompt
        self.seconds = [0.0 for _ in paths]

    def run(self, together: bool) -> None:
        with ExitStack() as stack:
            total = sum(len(ids) for windows in self.shown for ids in windows.token_ids)
            bar = stack.enter_context(progress_bar("evaluate", total=total, unit="token", show=self.settings.progress))
            first = stack.enter_context(self.opener(0))
            if len(self.paths) == 1:
                for k in range(len(self.shown[0].token_ids)):
                    self._read(first, 0, k, bar)
                self._answer(first, 0, bar)
                return
            if together:
                second = stack.enter_context(self.opener(1))
                for k in range(len(self.shown[0].token_ids)):
                    said = self._read(first, 0, k, bar)
                    self._diverge(said, self._read(second, 1, k, bar), 1)
                self._answer(first, 0, bar)
                self._answer(second, 1, bar)
                return
            store = stack.enter_context(StoredLogits.in_temporary_file(list(map(len, self.shown[0].token_ids))))
            for k in range(len(self.shown[0].token_ids)):
                said = self._read(first, 0, k, bar)
                if self.refused is None:
                    store.put(k, said)
                del said
            self._answer(first, 0, bar)
            first.close()
            del first
            for model in range(1, len(self.paths)):
                with self.opener(model) as judge:
                    for k in range(len(self.shown[model].token_ids)):
                        said = self._read(judge, model, k, bar)
                        if self.refused is None:
                            self._diverge(store.get(k), said, model)
                        del said
                    self._answer(judge, model, bar)
                del judge

    def _read(self, judge: Judge, model: int, k: int, bar: Any) -> torch.Tensor:
        """Score window k and return its logits, fp32 [tokens, vocabulary]."""
        ids = self.shown[model].token_ids[k]
        start = perf_counter()
        logits = judge.logits(ids)
        targets = ids[1:].to(logits.device)
        losses = []
        for rows, wanted in zip(logits[:-1].split(ROWS), targets.split(ROWS), strict=True):
            losses.append(-rows.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double())
        nats = torch.cat(losses).cpu()
        if bool(nats.isnan().any()) or bool(logits[-1].isnan().any()):
            raise CompressionError(f"{self.paths[model]} gives NaN in window {k} of the text")
        self.nats[model].append(nats)
        self.best[model].append(logits.argmax(-1).cpu())
        self.seconds[model] += perf_counter() - start
        bar.update(len(ids))
        return logits

    def _diverge(self, first: torch.Tensor, second: torch.Tensor, model: int) -> None:
        if self.refused is None and first.shape[1] != second.shape[1]:
            self.refused = (
                f"the models have {first.shape[1]} and {second.shape[1]} logits: KL needs the same vocabulary"
            )
        if self.refused is None:
            self.kl[model].append(kl_divergence(first, second).cpu())

    def _answer(self, judge: Judge, model: int, bar: Any) -> None:
        tokenizer = self.tokenizers[model]
        for prompt in self.settings.prompts:
            bar.set_postfix_str("samples")
            self.answers[model].append(judge.continue_greedily(prompt_ids(tokenizer, prompt), self.settings.max_tokens))

    def score(self, model: int) -> ModelScore:
        from cai_runtime.slim.inspect import inspect_checkpoint

        held = inspect_checkpoint(self.paths[model], keep=self.keeps[model])
        per_window = self.nats[model]
        nats = torch.cat(per_window)
        mean, windows = float(nats.mean()), self.shown[model]
        error = _standard_error([float(n.mean()) for n in per_window], [len(n) for n in per_window])
        # Without a BOS token the first token of a window is not scored. It counts with the mean bytes of a token.
        per_byte = windows.tokens / sum(windows.nbytes)
        return ModelScore(
            path=str(self.paths[model]),
            slim=held.format_version is not None,
            keep=self.keeps[model],
            parameters=held.parameters,
            nbytes=held.nbytes,
            perplexity=_exp(mean),
            perplexity_error=_exp(mean) * error,
            nats=mean,
            bits_per_byte=mean * per_byte / math.log(2),
            tokens=len(nats),
            seconds=self.seconds[model],
        )

    def divergence(self, model: int) -> Divergence | None:
        kl = self.kl[model]
        if not kl or self.refused is not None:
            return None
        differences = [b - a for a, b in zip(self.nats[0], self.nats[model], strict=True)]
        ratio = _exp(float(torch.cat(differences).mean()))
        scored = [len(d) for d in differences]
        same = [(a == b).double() for a, b in zip(self.best[0], self.best[model], strict=True)]
        positions = [len(values) for values in kl]
        every = torch.cat(kl)
        at = torch.quantile(every[: 1 << 24], torch.tensor(QUANTILES, dtype=every.dtype))
        return Divergence(
            ratio=ratio,
            ratio_error=ratio * _standard_error([float(d.mean()) for d in differences], scored),
            kl=float(every.mean()),
            kl_error=_standard_error([float(values.mean()) for values in kl], positions),
            kl_quantiles={f"{q:g}": float(v) for q, v in zip(QUANTILES, at, strict=True)},
            top1=float(torch.cat(same).mean()),
            top1_error=_standard_error([float(s.mean()) for s in same], positions),
            positions=len(every),
        )

    def window_means(self, model: int) -> dict[str, list[float]]:
        """Means of each window for the reference, and for model `model` unless that is 0."""
        names = {"reference_nats": 0} if model == 0 else {"reference_nats": 0, "candidate_nats": model}
        means = {name: [float(n.mean()) for n in self.nats[k]] for name, k in names.items()}
        if self.kl[model] and self.refused is None:
            means["kl"] = [float(kl.mean()) for kl in self.kl[model]]
            best = zip(self.best[0], self.best[model], strict=True)
            means["top1"] = [float((a == b).double().mean()) for a, b in best]
        return means

    def samples(self, model: int) -> tuple[Sample, ...]:
        """The answers of the reference, and of model `model` unless that is 0."""
        found = []
        models = [0] if model == 0 else [0, model]
        for k, prompt in enumerate(self.settings.prompts):
            ids = [self.answers[m][k] for m in models]
            texts = [self.tokenizers[m].decode(i, skip_special_tokens=True) for m, i in zip(models, ids, strict=True)]
            same = None
            if len(ids) == 2 and self.refused is None:
                same = next((n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
            found.append(Sample(prompt, texts[0], texts[1] if len(texts) == 2 else None, same))
        return tuple(found)


def kl_divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(first || second) in nats, fp32 [tokens], of logits fp32 [tokens, vocabulary].

    A token to which `first` gives probability 0 adds nothing.
    """
    found = []
    for a, b in zip(first.split(ROWS), second.to(first.device).split(ROWS), strict=True):
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        weight = p.exp()
        terms = torch.where(weight > 0, weight * (p - q), 0.0)
        found.append(terms.double().sum(-1).clamp(min=0.0).float())  # negative by rounding alone
    return torch.cat(found)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt: a user's message where there is a chat template, else a text to continue."""
    from cai_runtime.formats.messages import Message
    from cai_runtime.formats.template import has_template, render

    if has_template(tokenizer):
        return render(tokenizer, [Message("user", prompt)])
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    if not ids:
        raise CompressionError(f"the prompt {prompt!r} has no tokens")
    return ids


def _memory(path: Path, backend: Backend) -> int:
    """Estimated bytes of a loaded model: fp32 dense matrices for transformers, the size on disk for the engine."""
    from cai_runtime.slim.inspect import inspect_checkpoint

    held = inspect_checkpoint(path)
    if backend == "engine":
        return held.nbytes
    return 4 * (sum(row.spec.dense_parameters for row in held.modules) + held.other_parameters)


def _free(device_type: str) -> int:
    from cai_runtime.engine.memory import available_memory

    return available_memory(device_type)


def _standard_error(means: Sequence[float], weights: Sequence[int]) -> float:
    """Standard error of a mean over independent windows, weighted by their tokens; NaN for a single window."""
    n, total = len(means), sum(weights)
    if n < 2:
        return math.nan
    mean = sum(m * w for m, w in zip(means, weights, strict=True)) / total
    spread = sum((w * (m - mean)) ** 2 for m, w in zip(means, weights, strict=True))
    return math.sqrt(spread * n / (n - 1)) / total


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
