"""Calibration text that the model writes itself, so that nothing has to be downloaded (Williams et al. 2024,
"Self-calibration for Language Model Quantization and Pruning").

Each text starts from the token that begins a document, is sampled hot over its first tokens, which makes texts differ, and
then at `temperature`. A chat model also writes conversations, both sides of them, in its own template.
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

# Tokens that begin a document, by their usual names, for a tokenizer whose "beginning of sequence" begins a chat's turn.
SEPARATOR = "<|endoftext|>"
DOCUMENT_STARTS = (SEPARATOR, "<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>")
LOOP_CHECK = 16  # tokens from one look for a loop to the next
LEAST_WORDS = 4  # tokens of a turn or document before it may end


@dataclass(frozen=True)
class SelfSampling:
    """How a model's own text is sampled. Checked when made: CompressionError names the setting.

    temperature, top_p: of most tokens. start_temperature: of the first token of a document or user's turn; it falls evenly
    to `temperature` over `start_tokens` tokens. chat_share: of the sequences of a chat model, those that are conversations.
    turns: a conversation's questions, before another begins. lanes: sequences written at once.

    The defaults are the model's own distribution. SmolLM2-135M-Instruct, compressed to keep 0.8 on 12 such sequences and not
    trained, has a perplexity of 29.6 on Wikipedia; on text that reads better, at 0.9 with a top_p of 0.95, it has 33.6:
    what is seldom written is what the compressed model forgets. With a quarter of conversations instead of a half it has 3.8
    times the dense perplexity there at keep 0.5, healed, instead of 4.0; conversations lose about as much.
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
        """Of a text's token number `step`, from 0."""
        heat = max(0.0, 1 - step / self.start_tokens) if heated else 0.0
        return SamplingParams(
            temperature=self.temperature + heat * (self.start_temperature - self.temperature), top_p=self.top_p
        )


@dataclass(frozen=True)
class SelfText:
    """sequences: `samples` lists of `length` token ids. chats: how many of them are conversations. writer: what ran the
    model. loops: documents that were ended because they repeated themselves."""

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
    """Have the model at `model_path` write `samples` sequences of `length` tokens: documents one after another, the last cut
    off, or a conversation. The same `seed` gives the same text; no global random state is used or changed.

    Raises CompressionError: the model does not fit the memory or can't be sampled. CheckpointError: it is damaged.
    """
    sampling = sampling or SelfSampling()
    frame = chat_frame(tokenizer) if sampling.chat_share > 0 else None
    share = sampling.chat_share if frame is not None else 0.0
    # Evenly spread, so that every prefix of the sequences has about the same share.
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
    """start: the token that a document begins with; None: none is known. end: the token written behind a document; None:
    none. ends: tokens by which the model says that a text is over. banned: tokens that no text may hold."""

    start: int | None
    end: int | None
    ends: frozenset[int]
    banned: np.ndarray


def document_marks(tokenizer: Any, frame: ChatFrame | None, vocab_size: int) -> DocumentMarks:
    """What begins, ends and may not be in a text of this tokenizer, of a model with `vocab_size` logits."""
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
        end = None  # the mark of the next beginning is all that stands between two documents
    if frame is not None:
        ends |= {frame.answer[0], frame.next[0]} & special
    # A tokenizer may know more tokens than the model, and the model more than the tokenizer.
    special, ends = ({token for token in tokens if token < vocab_size} for tokens in (special, ends))
    unwanted = (special - ends) | set(range(len(tokenizer), vocab_size))
    return DocumentMarks(start, end, frozenset(ends), np.array(sorted(unwanted), dtype=np.int64))


class _Writer:
    """One sequence in the making. The model has seen `tokens[begin : begin + fed]` as the text at hand."""

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
        """The next tokens that the model has not seen, and the position of the first."""
        at = self.begin + self.fed
        ids = self.tokens[at : at + most]
        start, self.fed = self.fed, self.fed + len(ids)
        return ids, start

    def take(self, logits: np.ndarray) -> None:
        """Go on with the model's answer to the last feed, fp32 [vocab]."""
        if self.begin + self.fed < len(self.tokens):
            return  # more is to be fed first
        token = self._choose(logits)
        if token in self.marks.ends:
            self._end_turn()
            return
        self.tokens.append(token)
        self.written += 1
        if self._closed_by_words():
            self._end_turn()
            return
        # A model that knows nothing but loops must come to an end, too.
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
            self._end_turn()  # a question that takes no end

    def _closed_by_words(self) -> bool:
        """Whether the turn's last tokens are those by which the template ends it, which go: not every template ends turns
        with special tokens."""
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
        else:  # nothing marks a beginning: any token does (Liu et al. 2023, "LLM-QAT")
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
            self.tokens.append(self.frame.next[0])  # as a turn ends
        elif self.marks.end is not None:
            self.tokens.append(self.marks.end)
        self._begin_text()

    def _append_fixed(self, ids: Iterable[int]) -> None:
        """Fixed tokens, behind which something else begins."""
        self.tokens += ids
        self.turn_begin, self.written = len(self.tokens), 0
