"""One window of audio to tokens: beam search or samples, judged, and tried again at a higher temperature.

The order of attempts and their judgement are OpenAI's `decode_with_fallback` with faster-whisper's two refinements: text
that is unlikely in a window that probably holds no speech has not failed (it is skipped later), and if every attempt
failed, the likeliest of those whose text does not repeat itself is taken. Beyond them, a loop is found by its tokens, and
text that loops in every attempt ends with the loop's first turn.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cai_runtime.engine.beam_search import BeamSearch
from cai_runtime.engine.output import TokenOutput
from cai_runtime.engine.request import Finished, Request, SamplingParams
from cai_runtime.engine.segments import EncoderInput
from cai_runtime.speech.loops import find_loop
from cai_runtime.speech.options import Options
from cai_runtime.speech.prompts import SpeechText, WindowPrompt
from cai_runtime.speech.rules import rules_for
from cai_runtime.speech.tokens import SpeechTokens


@dataclass(frozen=True)
class Decoded:
    """What one attempt gave.

    tokens: without the end token. ended: whether that came, rather than the limit. logprobs: of each of the tokens.
    text: of the text tokens, stripped. avg_logprob: sum of the log probabilities, the end's included / (tokens + 1).
    looping: whether text tokens repeat themselves without end (`loops.find_loop`).
    generated, prompted: tokens computed for the window, in all attempts.
    """

    tokens: tuple[int, ...]
    ended: bool
    logprobs: tuple[float, ...]
    text: str
    temperature: float
    avg_logprob: float
    compression_ratio: float
    looping: bool = False
    no_speech_prob: float = 0.0
    generated: int = 0
    prompted: int = 0


class ShareOf:
    """A `LogitsRules` that changes nothing: it notes how likely tokens are, among all or among some.

    wanted: ids whose shares are noted. among: ids whose shares sum to 1; None: all of the vocabulary.
    """

    def __init__(self, wanted: Sequence[int], among: Sequence[int] | None = None):
        self._wanted = np.array(wanted, np.int64)
        self._among = None if among is None else np.array(among, np.int64)
        self.shares = np.zeros(len(wanted))  # float64

    def __call__(self, row: np.ndarray, generated: Sequence[int]) -> None:
        if generated:  # a draft behind the token that was asked about
            return
        pool = row if self._among is None else row[self._among]
        top = pool.max()
        total = np.exp(pool - top).sum(dtype=np.float64)
        self.shares = np.exp(row[self._wanted].astype(np.float64) - float(top)) / total


def encoder_input(features: np.ndarray, positions: int) -> EncoderInput:
    """A window's features (fp32 [3000, mels], C-contiguous) as the engine takes them, named by their content."""
    features = np.ascontiguousarray(features, np.float32)
    return EncoderInput(features, positions, hashlib.blake2b(features.data, digest_size=16).digest())


def probe(encoder: EncoderInput, prompt_ids: Sequence[int], share: ShareOf) -> Request:
    """A request that only notes shares of the token after a prompt."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    return Request(segments=(encoder, list(prompt_ids)), sampling=sampling, rules=share, output=TokenOutput)


@dataclass(eq=False)
class WindowTask:
    """The attempts at one window.

    key: what else than the seed of the options determines its samples, such as the window's first frame. whole: as for
    `rules.Rules`.
    Ask `requests()`, give their results to `take()`, and again until it returns the window's result.
    """

    encoder: EncoderInput
    prompt: WindowPrompt
    key: int
    tokens: SpeechTokens
    options: Options
    text: SpeechText
    whole: int = 0
    _attempt: int = 0
    _tried: list[Decoded] = field(default_factory=list)
    _no_speech: float = 0.0
    _generated: int = 0
    _prompted: int = 0

    def __post_init__(self) -> None:
        self._rules = rules_for(self.tokens, self.options, self.prompt.lead, self.whole)
        self._segments = (self.encoder, list(self.prompt.ids))  # one object, so that its pages are computed once
        self._share = ShareOf([self.tokens.no_speech])
        room = self.tokens.max_context - len(self.prompt.ids)
        self._most = min(room, self.options.max_new_tokens or room)

    @property
    def temperature(self) -> float:
        """Of the attempt that comes."""
        return self.options.temperature[self._attempt]

    def requests(self) -> list[Request]:
        """Those of the next attempt. The first one also asks whether there is speech."""
        options, temperature = self.options, self.temperature
        base = SamplingParams(
            max_tokens=self._most, temperature=temperature, logprobs=0, stop_token_ids=(self.tokens.eot,)
        )
        if temperature == 0:
            beam = None
            if options.beam_size > 1:
                beam = BeamSearch(options.beam_size, options.patience, options.length_penalty)
            found = [self._request(base, beam)]
        else:
            found = [self._request(replace(base, seed=self._seed(i))) for i in range(options.best_of)]
        if self._attempt == 0:
            found.append(probe(self.encoder, self.prompt.begin, self._share))
        return found

    def _request(self, sampling: SamplingParams, beam: BeamSearch | None = None) -> Request:
        return Request(segments=self._segments, sampling=sampling, rules=self._rules, beam=beam, output=TokenOutput)

    def _seed(self, candidate: int) -> int:
        """A seed that no other sample of the file has."""
        parts = (self.options.seed or 0, self.key, self._attempt, candidate)
        return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())

    def take(self, finished: Sequence[Finished]) -> Decoded | None:
        """The window's result; None if another attempt is needed."""
        self._generated += sum(len(one.token_ids) for one in finished)
        self._prompted += sum(one.prompt_tokens for one in finished)
        if self._attempt == 0:
            finished, self._no_speech = finished[:-1], float(self._share.shares[0])
        best = max((self._decoded(one) for one in finished), key=self._score)
        self._tried.append(best)
        self._attempt += 1
        if self._passes(best):
            return self._whole(best)
        if self._attempt < len(self.options.temperature):
            return None
        varied = [one for one in self._tried if not self._repeats(one)]
        likeliest = max(varied or self._tried, key=lambda one: one.avg_logprob)
        if likeliest.looping and self._repeats(likeliest):
            likeliest = self._first_turn(likeliest)
        # The last temperature, so that the text counts as one that went wrong, and is no prompt for the next window.
        return self._whole(replace(likeliest, temperature=self.options.temperature[-1]))

    def _whole(self, decoded: Decoded) -> Decoded:
        return replace(decoded, no_speech_prob=self._no_speech, generated=self._generated, prompted=self._prompted)

    def _decoded(self, finished: Finished) -> Decoded:
        ended = bool(finished.token_ids) and finished.token_ids[-1] == self.tokens.eot
        ids = finished.token_ids[:-1] if ended else finished.token_ids
        logprobs = [found.logprob for found in finished.logprobs or ()]
        text = self.text.decode(ids).strip()
        return Decoded(
            tokens=tuple(ids),
            ended=ended,
            logprobs=tuple(logprobs[: len(ids)]),
            text=text,
            temperature=self.temperature,
            avg_logprob=float(sum(logprobs)) / (len(ids) + 1),
            compression_ratio=compression_ratio(text),
            looping=find_loop([token for token in ids if token < self.tokens.eot]) is not None,
        )

    def _score(self, decoded: Decoded) -> float:
        count = len(decoded.tokens)
        return decoded.avg_logprob * (count + 1) / max(count, 1) ** self.options.length_penalty

    def _passes(self, decoded: Decoded) -> bool:
        """Whether the text is good enough, or there is nothing to transcribe."""
        options = self.options
        least = options.log_prob_threshold
        unlikely = least is not None and decoded.avg_logprob < least
        if unlikely and options.no_speech_threshold is not None and self._no_speech > options.no_speech_threshold:
            return True
        return not unlikely and not self._repeats(decoded)

    def _repeats(self, decoded: Decoded) -> bool:
        threshold = self.options.compression_ratio_threshold
        return threshold is not None and (decoded.looping or decoded.compression_ratio > threshold)

    def _first_turn(self, decoded: Decoded) -> Decoded:
        """A text in a loop, cut behind the loop's first turn; what follows is heard again where its time is known."""
        first, eot = self.tokens.timestamp_begin, self.tokens.eot
        places = [at for at, token in enumerate(decoded.tokens) if token < eot]
        loop = find_loop([decoded.tokens[at] for at in places])
        assert loop is not None
        stop = places[loop.cut - 1] + 1
        ids, logprobs = list(decoded.tokens[:stop]), list(decoded.logprobs[:stop])
        if stop < len(decoded.tokens) and decoded.tokens[stop] >= first:
            ids += [decoded.tokens[stop]] * 2  # a pair of times, at which the next window begins
            logprobs += [0.0] * 2
        text = self.text.decode(ids).strip()
        return replace(
            decoded, tokens=tuple(ids), logprobs=tuple(logprobs), text=text, compression_ratio=compression_ratio(text)
        )


def is_silence(decoded: Decoded, options: Options) -> bool:
    """Whether a window is to be skipped: probably no speech, and no likely text either."""
    if options.no_speech_threshold is None or decoded.no_speech_prob <= options.no_speech_threshold:
        return False
    return options.log_prob_threshold is None or decoded.avg_logprob <= options.log_prob_threshold


def compression_ratio(text: str) -> float:
    """Bytes of the text / bytes that zlib makes of them: high for text that repeats itself."""
    data = text.encode("utf-8")
    return len(data) / len(zlib.compress(data))
