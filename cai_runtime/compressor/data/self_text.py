"""Calibration text sampled from the model itself, so that nothing is downloaded (Williams et al. 2024, "Self-calibration for
Language Model Quantization and Pruning").

A document starts from the beginning-of-document token. Its first tokens are sampled at a higher temperature, for diversity.
A chat model also writes conversations in its own template, both the user's and the assistant's turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cai_runtime.compressor.data.conversation import ChatFrame, chat_frame
from cai_runtime.compressor.data.repetition import WINDOW, loops
from cai_runtime.engine.request import SamplingParams
from cai_runtime.engine.sampling import sample_one
from cai_runtime.errors import CompressionError
from cai_runtime.kernels.sampling import uniform
from cai_runtime.progress import progress_bar
from cai_runtime.stock.next_token import Feed, NextToken, open_next_token

# Usual names of beginning-of-document tokens, for tokenizers without bos_token or whose bos_token begins a chat turn.
SEPARATOR = "<|endoftext|>"
DOCUMENT_STARTS = (SEPARATOR, "<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>")
LOOP_CHECK = 16  # tokens between two checks for a loop
LEAST_WORDS = 4  # minimum tokens of a turn or document


@dataclass(frozen=True)
class SelfSampling:
    """Sampling settings of self-written text. Raises CompressionError, which names the setting, for a value out of range.

    temperature, top_p: of all but the first tokens. start_temperature: of the first token of a document or user turn; it
    falls linearly to `temperature` over `start_tokens` tokens. chat_share: share of conversations among the sequences of a
    chat model. turns: user turns per conversation. lanes: sequences written at once (batch size).

    Apart from the start, the defaults sample the model's own distribution. Sharper text makes the compressed model forget
    what it lacks: SmolLM2-135M-Instruct at keep 0.8, calibrated on 12 sequences without training, has a Wikipedia perplexity
    of 29.6 with the defaults, and 33.6 with temperature 0.9 and top_p 0.95. At keep 0.5, healed, chat_share 0.25 gives 3.8
    times the dense perplexity, 0.5 gives 4.0. On conversations both give about the same.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    start_temperature: float = 1.2
    start_tokens: int = 4
    chat_share: float = 0.25
    turns: int = 3
    lanes: int = 16

    def __post_init__(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise CompressionError(f"self-written calibration text: {message}")

        need(self.temperature > 0, f"temperature must be above 0, is {self.temperature}")
        need(self.start_temperature > 0, f"start_temperature must be above 0, is {self.start_temperature}")
        need(0 < self.top_p <= 1, f"top_p must be in (0, 1], is {self.top_p}")
        need(0 <= self.chat_share <= 1, f"chat_share must be in [0, 1], is {self.chat_share}")
        for name in ("start_tokens", "turns", "lanes"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1, is {getattr(self, name)}")

    def params(self, step: int, heated: bool) -> SamplingParams:
        """Sampling parameters of token number `step` (from 0) of a text. heated: apply `start_temperature`."""
        heat = max(0.0, 1 - step / self.start_tokens) if heated else 0.0
        return SamplingParams(
            temperature=self.temperature + heat * (self.start_temperature - self.temperature), top_p=self.top_p
        )


@dataclass(frozen=True)
class SelfText:
    """Self-written text.

    sequences: `samples` lists of `length` token ids. chats: number of conversations among them. writer: name of the backend
    that ran the model. loops: number of texts ended because they fell into a loop.
    """

    sequences: list[list[int]]
    chats: int
    writer: str
    loops: int


def write_self_text(
    model_path: str | Path,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    sampling: SelfSampling | None = None,
    device: str = "cpu",
    progress: bool | None = None,
) -> SelfText:
    """Sample `samples` sequences of `length` tokens from the model at `model_path`.

    A sequence holds consecutive documents or consecutive conversations, the last one truncated. The same `seed` gives the
    same text. No global random state is used or changed.

    sampling: None: the defaults of `SelfSampling`. device: "cpu" or "cuda[:n]". progress: bar on stderr; None: on a terminal
    only.

    Raises CompressionError: the model does not fit into memory or can't be sampled. CheckpointError: it is damaged.
    """
    sampling = sampling or SelfSampling()
    frame = chat_frame(tokenizer) if sampling.chat_share > 0 else None
    share = sampling.chat_share if frame is not None else 0.0
    # Evenly spread, so that every prefix of the sequences has about the same share of conversations.
    is_chat = [int((k + 1) * share) > int(k * share) for k in range(samples)]
    model = open_next_token(
        Path(model_path), lanes=min(sampling.lanes, samples), length=length, device=device, progress=progress
    )
    try:
        marks = document_marks(tokenizer, frame, model.vocab_size)
        writers = [
            _Writer(length, sampling, marks, frame if chat else None, model, key=(seed % 2**64) << 64 | k)
            for k, chat in enumerate(is_chat)
        ]
        with progress_bar("write text", total=samples * length, unit="tok", show=progress) as bar:
            for k in range(0, samples, model.lanes):
                _write_wave(model, writers[k : k + model.lanes], bar)
    finally:
        model.close()
    return SelfText([w.tokens[:length] for w in writers], sum(is_chat), model.name, sum(w.loops for w in writers))


def _write_wave(model: NextToken, writers: Sequence[_Writer], bar: Any) -> None:
    model.begin_wave()
    lanes = dict(enumerate(writers))
    while lanes:
        feeds = [Feed(lane, *writer.feed(model.max_feed)) for lane, writer in lanes.items()]
        for writer, row in zip(list(lanes.values()), model.logits(feeds), strict=True):
            before = writer.progress
            writer.take(row)
            bar.update(writer.progress - before)
        lanes = {lane: writer for lane, writer in lanes.items() if not writer.done}


@dataclass(frozen=True)
class DocumentMarks:
    """Special tokens of documents.

    start: the token that begins a document; None: unknown. end: the token written behind a document; None: none. ends: stop
    tokens, by which the model ends a text or turn. banned: int64 ids that are never sampled, sorted.
    """

    start: int | None
    end: int | None
    ends: frozenset[int]
    banned: np.ndarray


def document_marks(tokenizer: Any, frame: ChatFrame | None, vocab_size: int) -> DocumentMarks:
    """The document marks of a tokenizer and a model with `vocab_size` logits. frame: of its chat template, if any."""
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    vocabulary = tokenizer.get_vocab()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if start is None or (frame is not None and start in frame.next):
        known = [vocabulary[name] for name in DOCUMENT_STARTS if vocabulary.get(name) in special]
        known += [token for token in (end, start) if token is not None]
        start = next((token for token in known if token < vocab_size), None)
    ends = {token for token in (start, end, tokenizer.pad_token_id) if token is not None}
    if start == end or (start is not None and start == vocabulary.get(SEPARATOR)):
        end = None  # the start token of the next document alone separates two documents
    if frame is not None:
        ends |= {frame.answer[0], frame.next[0]} & special
    # The tokenizer may have more tokens than the model has logits, or fewer.
    special, ends = ({token for token in tokens if token < vocab_size} for tokens in (special, ends))
    unwanted = (special - ends) | set(range(len(tokenizer), vocab_size))
    return DocumentMarks(start, end, frozenset(ends), np.array(sorted(unwanted), dtype=np.int64))


class _Writer:
    """One sequence while it is written. The model's KV cache holds tokens[begin : begin + fed], the start of the current
    text."""

    def __init__(
        self,
        length: int,
        sampling: SelfSampling,
        marks: DocumentMarks,
        frame: ChatFrame | None,
        model: NextToken,
        *,
        key: int,
    ):
        self.length, self.sampling, self.marks, self.frame = length, sampling, marks, frame
        self.max_context, self.vocab_size, self.key = model.max_context, model.vocab_size, key
        self.tokens: list[int] = []
        self.loops = self.fed = self.written = 0
        self._draws = 0
        self._ends = np.array(sorted(marks.ends), dtype=np.int64)
        self._begin_text()

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.length

    @property
    def progress(self) -> int:
        return min(len(self.tokens), self.length)

    def feed(self, most: int) -> tuple[list[int], int]:
        """Up to `most` tokens that are not in the KV cache yet, and the position of the first."""
        at = self.begin + self.fed
        ids = self.tokens[at : at + most]
        start, self.fed = self.fed, self.fed + len(ids)
        return ids, start

    def take(self, logits: np.ndarray) -> None:
        """Sample the next token. logits: fp32 [vocab], the model's output for the last feed."""
        if self.begin + self.fed < len(self.tokens):
            return  # the prefill is not complete
        token = self._choose(logits)
        if token in self.marks.ends:
            self._end_turn()
            return
        self.tokens.append(token)
        self.written += 1
        if self._closed_by_words():
            self._end_turn()
            return
        # The limit on loops ends a sequence even if the model writes nothing but loops.
        if (
            self.written % LOOP_CHECK == 0
            and self.loops < self.length // WINDOW
            and loops(self.tokens[self.turn_begin :])
        ):
            del self.tokens[-WINDOW // 2 :]
            self.loops += 1
            self._end_text()
        elif len(self.tokens) - self.begin >= self.max_context:
            self._end_text()
        elif self.frame is not None and self.asking and self.written >= max(self.length // 4, LEAST_WORDS):
            self._end_turn()  # the user turn is too long

    def _closed_by_words(self) -> bool:
        """Whether the turn ends with the template's closing tokens; removes them. Some templates end turns with plain
        text instead of special tokens."""
        if self.frame is None:
            return False
        closing = self.frame.answer if self.asking else self.frame.next
        if self.written < len(closing) + LEAST_WORDS or tuple(self.tokens[-len(closing) :]) != closing:
            return False
        del self.tokens[-len(closing) :]
        return True

    def _choose(self, logits: np.ndarray) -> int:
        logits = logits.copy()
        logits[self.marks.banned] = -np.inf
        if self.written < LEAST_WORDS:
            logits[self._ends] = -np.inf
        params = self.sampling.params(self.written, self.asking or self.frame is None)
        return sample_one(logits, params, self._uniform(), position=self.fed)

    def _uniform(self) -> float:
        self._draws += 1
        return uniform(self.key, self._draws)

    def _begin_text(self) -> None:
        self.begin, self.fed, self.asked = len(self.tokens), 0, 1
        self.asking = self.frame is not None
        if self.frame is not None:
            self._append_fixed(self.frame.opening)
        elif self.marks.start is not None:
            self._append_fixed((self.marks.start,))
        else:  # without a start token, begin with a random token (Liu et al. 2023, "LLM-QAT")
            self.written = 0
            self._append_fixed((self._choose(np.zeros(self.vocab_size, dtype=np.float32)),))

    def _end_turn(self) -> None:
        if self.frame is None or (not self.asking and self.asked == self.sampling.turns):
            self._end_text()
        elif self.asking:
            self.asking = False
            self._append_fixed(self.frame.answer)
        else:
            self.asking, self.asked = True, self.asked + 1
            self._append_fixed(self.frame.next)

    def _end_text(self) -> None:
        if self.frame is not None:
            self.tokens.append(self.frame.next[0])  # the token that ends an assistant turn
        elif self.marks.end is not None:
            self.tokens.append(self.marks.end)
        self._begin_text()

    def _append_fixed(self, ids: Iterable[int]) -> None:
        """Append fixed tokens, behind which a new turn or document begins."""
        self.tokens += ids
        self.turn_begin, self.written = len(self.tokens), 0
