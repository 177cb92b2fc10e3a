"""Models and engines for tests of transcription: scripted ones, and an engine that answers requests one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cai_runtime.engine.request import Finished, Request, TokenLogprobs
from cai_runtime.engine.segments import EncoderInput
from cai_runtime.speech.options import Options
from cai_runtime.speech.prompts import SpeechText
from cai_runtime.speech.results import Transcript
from cai_runtime.speech.steps import Answer, Ask, Done, Need, Ready, Steps
from cai_runtime.speech.tokens import SpeechTokens
from cai_runtime.speech.transcriber import transcribe_steps

PLACE = 1e-6  # of a frame's number in its last feature, too small to sound
WORDS = 100  # text tokens of the small vocabulary


def small_tokens(languages: Sequence[str] = (), **fields) -> SpeechTokens:
    """Control tokens of a vocabulary with 100 text tokens."""
    at = WORDS
    names = ["eot", "sot", *languages, "translate", "transcribe", "sot_lm", "sot_prev", "no_speech", "no_timestamps"]
    ids = {name: at + i for i, name in enumerate(names)}
    spoken = {code: ids.pop(code) for code in languages}
    begin = ids["no_timestamps"] + 1
    known = {"begin_suppress_tokens": (0, ids["eot"]), "alignment_heads": ((0, 0),)}
    return SpeechTokens(**ids, languages=spoken, timestamp_begin=begin, **{**known, **fields})


class WordTokenizer:
    """Token k is the word " wk"."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(f" w{token}" for token in token_ids)


class Track:
    """Audio of `frames` frames whose features [frames, mels] are given, or zeros."""

    def __init__(self, frames: int, features: np.ndarray | None = None, mels: int = 2):
        self.frames, self.mels = frames, mels
        self.all = np.zeros((frames, mels), np.float32) if features is None else features
        self.all[:, -1] = np.arange(frames) * PLACE  # so that each window knows where it lies
        self.starts: list[int] = []

    @property
    def seconds_known(self) -> float:
        return self.frames / 100

    def features(self, start: int) -> tuple[np.ndarray, int]:
        assert not self.starts or start >= self.starts[-1], "windows move forward"
        self.starts.append(start)
        window = np.zeros((3000, self.mels), np.float32)
        part = self.all[start : start + 3000]
        window[: len(part)] = part
        return window, len(part)


def place(encoder: EncoderInput) -> int:
    """The frame at which a window of a `Track` begins."""
    return round(float(encoder.features[0, -1]) / PLACE)


Logits = Callable[[EncoderInput, list[int], int], np.ndarray]
"""(encoder input, all tokens so far, how many of them are the prompt) -> fp32 [vocabulary]."""


@dataclass
class FakeHandle:
    run: Callable[[], Finished]
    done: bool = True

    def result(self) -> Finished:
        return self.run()


@dataclass
class FakeEngine:
    """Answers requests by a function from tokens to logits, one row at a time."""

    logits: Logits
    eot: int
    attention: Callable[[Request], np.ndarray] | None = None  # None: it moves along the audio
    done: bool = True  # whether requests are finished before anybody waits for them
    requests: list[Request] = field(default_factory=list)
    handles: list[FakeHandle] = field(default_factory=list)

    def submit_all(self, requests: Sequence[Request]) -> list[FakeHandle]:
        made = [FakeHandle(lambda one=one: self.answer(one), done=self.done) for one in requests]
        self.requests += requests
        self.handles += made
        return made

    def answer(self, request: Request) -> Finished:
        encoder, prompt = request.segments
        if request.alignment is not None:
            return finished((), (), len(prompt), attention=(self.attention or moving)(request))
        if request.beam is not None:
            found, logprobs = self._beam(encoder, list(prompt), request)
        else:
            found, logprobs = self._single(encoder, list(prompt), request)
        return finished(found, logprobs, len(prompt))

    def _row(self, encoder: EncoderInput, prompt: list[int], found: list[int], request: Request) -> np.ndarray:
        row = np.array(self.logits(encoder, prompt + found, len(prompt)), np.float32)
        if request.rules is not None:
            request.rules(row, found)
        return row

    def _single(self, encoder, prompt, request):
        found, logprobs = [], []
        draw = np.random.default_rng(request.sampling.seed)
        while len(found) < request.sampling.max_tokens:
            row = self._row(encoder, prompt, found, request)
            token = int(row.argmax())
            if request.sampling.temperature > 0:
                weights = np.exp((row - row.max()).astype(np.float64) / request.sampling.temperature)
                token = int(draw.choice(len(row), p=weights / weights.sum()))
            found.append(token)
            logprobs.append(float(log_softmax(row)[token]))
            if token == self.eot:
                break
        return found, logprobs

    def _beam(self, encoder, prompt, request):
        beam, live, ended = request.beam, [([], [])], []
        wanted = round(beam.width * beam.patience)
        for _ in range(request.sampling.max_tokens):
            proposals = []
            for found, logprobs in live:
                scores = log_softmax(self._row(encoder, prompt, found, request))
                best = np.argsort(-scores, kind="stable")[: 2 * beam.width]
                proposals += [([*found, int(t)], [*logprobs, float(scores[t])]) for t in best if scores[t] > -np.inf]
            live = []
            for one in sorted(proposals, key=lambda p: -sum(p[1])):
                if one[0][-1] == self.eot:
                    ended.append(one)
                else:
                    live.append(one)
                if len(live) == beam.width:
                    break
            if len(ended) >= wanted or not live:
                break
        ended += live[: max(wanted - len(ended), 0)]
        lengths = [len(found) - (found[-1:] == [self.eot]) for found, _ in ended]
        scores = [sum(p) / max(n, 1) ** beam.length_penalty for (_, p), n in zip(ended, lengths, strict=True)]
        return ended[int(np.argmax(scores))]


def moving(request: Request) -> np.ndarray:
    """The attention [heads, count, positions] of tokens that stand side by side along a whole window."""
    return _attention(request, lambda row, count: row)


def resting(request: Request) -> np.ndarray:
    """The attention of tokens that all look at the same place."""
    return _attention(request, lambda row, count: count // 3)


def _attention(request: Request, part_of: Callable[[int, int], int]) -> np.ndarray:
    encoder, wanted = request.segments[0], request.alignment
    draw = np.random.default_rng(0)
    weights = draw.random((len(wanted.heads), wanted.count, encoder.rows)) * 0.2 + 0.01
    edges = np.linspace(0, encoder.rows, wanted.count + 1).round().astype(int)
    for row in range(wanted.count):
        part = part_of(row, wanted.count)
        weights[:, row, edges[part] : edges[part + 1]] += 2.0
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def log_softmax(row: np.ndarray) -> np.ndarray:
    row = row.astype(np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def finished(token_ids: Sequence[int], logprobs: Sequence[float], prompt_tokens: int = 1, **more) -> Finished:
    found = tuple(TokenLogprobs(t, p) for t, p in zip(token_ids, logprobs, strict=True))
    return Finished((), tuple(token_ids), "stop", prompt_tokens, 0, logprobs=found, **more)


def scripted(script: Callable[[EncoderInput], list[int]], tokens: SpeechTokens, sure: float = 20.0) -> Logits:
    """A model that says `script(encoder input)` and ends. sure: how far its choice lies above all other logits."""

    def logits(encoder: EncoderInput, so_far: list[int], prompt: int) -> np.ndarray:
        row = np.zeros(tokens.vocabulary, np.float32)
        words = script(encoder)
        at = len(so_far) - prompt
        row[words[at] if at < len(words) else tokens.eot] = sure
        return row

    return logits


def run(logits: Logits | None, options: Options, tokens: SpeechTokens, track: Track, *, text=None, engine=None):
    """(transcript, what was done, engine) of a track, by a model or an engine."""
    engine = engine or FakeEngine(logits, tokens.eot)
    text = text or SpeechText(WordTokenizer(), tokens)
    driven = drive(transcribe_steps(track, tokens, options, text), engine)
    found = []
    while True:
        try:
            found.append(next(driven))
        except StopIteration as end:
            return end.value, found, engine


def drive(steps: Steps, engine: FakeEngine) -> Generator[Done, None, Transcript]:
    """Run a transcription; yields what is `Done`, and returns the Transcript. tests/api has the tests of the real driver."""
    answer: Any = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = None
        match step:
            case Done():
                yield step
            case Ask():
                answer = engine.submit_all(step.requests)
            case Ready():
                answer = all(handle.done for handle in step.ticket)
            case Need() | Answer():
                handles = engine.submit_all(step.requests) if isinstance(step, Need) else step.ticket
                answer = [handle.result() for handle in handles]


def draw_tokens(draw: np.random.Generator, tokens: SpeechTokens) -> list[int]:
    """Up to 12 tokens; times are as frequent as words, small times more frequent than others, so that windows are many."""
    found = []
    for _ in range(draw.integers(0, 13)):
        kind = draw.integers(0, 4)
        time = tokens.timestamp_begin + draw.integers(0, 1501 if kind == 2 else 300)
        found.append(int(draw.integers(1, 90) if kind < 2 else time))
    return found


class WhisperLogits:
    """Logits of transformers' Whisper, with a cache of keys and values for the texts that go on."""

    def __init__(self, path):
        import torch
        from transformers import WhisperForConditionalGeneration

        self.model = WhisperForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        self.model.eval()
        self._encoded: dict[bytes, object] = {}
        self._texts: dict[tuple[bytes, tuple[int, ...]], tuple[object, np.ndarray]] = {}

    def __call__(self, encoder: EncoderInput, so_far: list[int], prompt: int) -> np.ndarray:
        import copy

        from transformers import EncoderDecoderCache

        key = encoder.digest, tuple(so_far)
        if key not in self._texts:
            before, cache = self._texts.get((encoder.digest, tuple(so_far[:-1]))), None
            if before:  # several texts may go on from it
                own = copy.deepcopy(before[0].self_attention_cache)
                cache = EncoderDecoderCache(own, before[0].cross_attention_cache)
            output = self.forward(encoder, so_far[-1:] if before else so_far, past_key_values=cache, use_cache=True)
            if len(self._texts) > 64:
                self._texts.pop(next(iter(self._texts)))
            self._texts[key] = output.past_key_values, output.logits[0, -1].numpy().copy()
        return self._texts[key][1]

    def forward(self, encoder: EncoderInput, token_ids: Sequence[int], **options):
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        with torch.inference_mode():
            if encoder.digest not in self._encoded:
                features = torch.from_numpy(encoder.features.T.copy())[None]
                self._encoded[encoder.digest] = self.model.get_encoder()(features).last_hidden_state
            encoded = BaseModelOutput(last_hidden_state=self._encoded[encoder.digest])
            ids = torch.tensor([list(token_ids)])
            return self.model(encoder_outputs=encoded, decoder_input_ids=ids, **options)

    def attention(self, request: Request) -> np.ndarray:
        """What a request for an alignment wants."""
        encoder, prompt = request.segments
        weights = self.forward(encoder, prompt, output_attentions=True, use_cache=False).cross_attentions
        wanted = request.alignment
        return np.stack([weights[layer][0, head, -wanted.count :].numpy() for layer, head in wanted.heads])
