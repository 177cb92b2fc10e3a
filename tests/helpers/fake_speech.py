"""A speech model that is known: its audio is text, and each letter a window, which the alphabet's engine goes on from."""

import json
from types import SimpleNamespace

from cai_runtime.api.transcriptions.work import SpeechWork
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.errors import UnreadableAudioError
from cai_runtime.speech.results import Segment, Transcript, Word
from cai_runtime.speech.steps import Answer, Ask, Done, Need, Ready

WINDOW = 2.5  # seconds of a letter
# What SpeechTokens looks for.
GENERATION = {
    "decoder_start_token_id": 100, "eos_token_id": 101, "prev_sot_token_id": 102, "no_timestamps_token_id": 104,
    "is_multilingual": True, "lang_to_id": {"<|en|>": 105, "<|de|>": 106, "<|yue|>": 107},
    "task_to_id": {"transcribe": 108, "translate": 109}, "alignment_heads": [[0, 0]],
}  # fmt: skip


def make_speech_dir(path, *, multilingual=True):
    """A directory that looks like a Whisper checkpoint."""
    path.mkdir()
    generation = {**GENERATION, "is_multilingual": multilingual}
    if not multilingual:
        del generation["lang_to_id"], generation["task_to_id"]
    (path / "config.json").write_text(json.dumps({"model_type": "whisper"}))
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


class FakeStream:
    def __init__(self):
        self.damage, self.closed = None, False

    def close(self):
        self.closed = True


class FakeSpeech:
    """Stands in for `begin_work`: keeps what it was called with, and the streams and steps that it made.

    A letter of the audio is a window of 2.5 s, whose text is the rest of the alphabet after it. A space is silence, `!`
    audio that can't be decoded, and `?` damage.
    """

    def __init__(self, *, engine=True):
        """engine: whether windows go to one; else a letter's text is its capital."""
        self.engine = engine
        self.files, self.options, self.streams, self.closed = [], [], [], []

    def __call__(self, file, options, opened):
        self.files.append(file)
        self.options.append(options)
        source = file.source.read() if hasattr(file.source, "read") else file.source
        if not isinstance(source, bytes):
            source = open(source, "rb").read()  # noqa: SIM115, PTH123
        if not source:
            raise UnreadableAudioError("the audio is empty: give some")
        stream = FakeStream()
        self.streams.append(stream)
        return SpeechWork(self.steps(source.decode(), options, opened, stream), stream)

    def steps(self, letters, options, opened, stream):
        segments = []
        try:
            tickets = []
            if options.batched and self.engine:
                for letter in letters:
                    tickets.append((yield Ask([self.request(letter, options, opened)])))  # noqa: PERF401
            for i, letter in enumerate(letters):
                if letter == "!":
                    raise UnreadableAudioError(f"the audio ends after {i * WINDOW} s in the middle of a frame")
                if letter == "?":
                    stream.damage = "the last frame is cut"
                found = []
                if letter.isalpha() and not self.engine:
                    finished = SimpleNamespace(text=letter.upper(), token_ids=[ord(letter)])
                    found = [self.segment(len(segments), i, finished, options)]
                elif letter.isalpha():
                    done = Answer(tickets[i]) if options.batched else Need([self.request(letter, options, opened)])
                    (finished,) = yield done
                    assert not options.batched or (yield Ready(tickets[i])) is True
                    found = [self.segment(len(segments), i, finished, options)]
                segments += found
                yield Done(found, (i + 1) * WINDOW, (i + 1) * WINDOW)
            words = tuple(word for segment in segments for word in segment.words or ())
            return Transcript(
                options.task, options.language or "de", 1.0 if options.language else 0.75, len(letters) * WINDOW,
                "".join(segment.text for segment in segments).strip(), tuple(segments),
                words if options.word_timestamps else None, tokens=7, prompt_tokens=5,
            )  # fmt: skip
        finally:
            self.closed.append(letters)

    @staticmethod
    def request(letter, options, opened):
        prompt = opened.tokenizer.encode(letter)
        return Request(prompt, SamplingParams(max_tokens=26, temperature=0.0, seed=options.seed))

    @staticmethod
    def segment(number, window, finished, options):
        start, end, text = window * WINDOW, (window + 1) * WINDOW - 0.1 - 1e-9, f" {finished.text}"
        words = (Word(start, end, text, 0.5),) if options.word_timestamps else None
        return Segment(
            number, round(start * 100), start, end, text, tuple(finished.token_ids), 0.0, -0.25, 1.5, 0.125, words
        )
