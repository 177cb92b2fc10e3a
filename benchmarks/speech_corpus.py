"""Makes three quarters of an hour of speech with known words, for transcription.py, long_audio.py and transcribe_many.py.

    pip install onnxruntime espeakng-loader
    python benchmarks/speech_corpus.py [DIR] [--repositories DIR] [--debian DIR]

DIR (default: speech-corpus in cai_runtime's cache) gets FLAC files at 16 kHz and corpus.jsonl. A line of it describes a
file: "audio", "text", "language", "voice", "kind" ("recorded" or "synthesized"), "seconds" and "sentences", each with its
start and end in seconds. Files are kept; a run goes on where the last one stopped.

DIR/calibration gets other sentences, to make checkpoints with: six files of joe's, of two more voices of Kokoro's each, and
the announcements that are in no other file.

Always made, from packages: Beckett's line of the speech sample; sentences of the Wikipedia sample's last quarter, spoken by
Piper's joe and by a voice of Kokoro; seven Spanish passages, spoken by two voices of Kokoro.
--repositories: a folder with clones of openai/whisper, cmusphinx/pocketsphinx and coqui-ai/TTS, named whisper, pocketsphinx
and TTS, for the Kennedy clip, five LibriVox sentences, and the first 32 lines of LJ Speech (public domain), which follow
each other in one file.
--debian: where asterisk-core-sounds-{en,es}-wav and asterisk-core-sounds-{en,es} were unpacked (dpkg -x), for announcements
read by a person in English and Spanish, at 8 kHz, ten to a file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from speech_clips import sentences
from speech_voices import Joe, Kokoro, Phonemes

from cai_runtime.audio.files import RATE, read_audio
from cai_runtime.convert.sources import fetch_file
from cai_runtime.convert.texts import split_articles, wikipedia_articles
from cai_runtime.home import cai_home

TEXTS = Path(__file__).with_name("speech_texts.json")
BECKETT = "Ever tried. Ever failed. No matter. Try again. Fail again. Fail better."
KENNEDY = "And so, my fellow Americans, ask not what your country can do for you, ask what you can do for your country."
JOE_FILES, KOKORO_FILES, CALIBRATION_FILES, SENTENCES = 9, 3, 6, 12  # English files of each, and sentences in each
CALIBRATION_VOICES = "jf_gongitsune", "jf_nezumi"  # heard in no other file
PROMPTS, PROMPT_FILES, PROMPT_WORDS = 10, 6, 5  # announcements of a file, files of a language, fewest words of one
PAUSES = 0.25, 0.9  # shortest and longest silence between sentences, seconds


@dataclass(frozen=True)
class Spoken:
    """A sentence and its sound, fp32 [samples] at 16 kHz."""

    text: str
    sound: np.ndarray


@dataclass(frozen=True)
class Line:
    """A line of corpus.jsonl."""

    audio: str
    text: str
    language: str
    voice: str
    kind: str
    seconds: float
    sentences: list[tuple[float, float, str]]


class Corpus:
    """The files in a directory, and the list that grows with them."""

    def __init__(self, directory: Path):
        self.directory, self.list = directory, directory / "corpus.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        kept = self.list.read_text().splitlines() if self.list.exists() else []
        self.lines: dict[str, Any] = {line["audio"]: line for line in map(json.loads, kept)}

    def add(self, name: str, language: str, voice: str, kind: str, speech: Callable[[], Iterable[Spoken]]) -> None:
        """Write the file `name`.flac of these sentences with pauses between them, unless it is there."""
        import soundfile

        audio = f"{name}.flac"
        if audio in self.lines and (self.directory / audio).is_file():
            return
        random = np.random.default_rng(sum(name.encode()))
        sounds, times, at = [], [], 0
        for spoken in speech():
            pause = int(random.uniform(*PAUSES) * RATE) if times else 0
            sounds += [np.zeros(pause, np.float32), spoken.sound]
            start = at + pause
            at = start + len(spoken.sound)
            times.append((round(start / RATE, 3), round(at / RATE, 3), spoken.text))
        soundfile.write(self.directory / audio, np.concatenate(sounds), RATE)
        text = " ".join(text for _, _, text in times)
        self.lines[audio] = asdict(Line(audio, text, language, voice, kind, round(at / RATE, 3), times))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines.values())
        self.list.write_text(text)
        print(f"{audio}: {at / RATE:.1f} s", flush=True)


def synthesize(voice: Any, language: str, texts: Iterable[str]) -> Iterator[Spoken]:
    import soxr

    for text in texts:
        sound = soxr.resample(voice(text, language), voice.rate, RATE)
        yield Spoken(text, np.asarray(0.5 * sound / max(float(np.abs(sound).max()), 1e-6), np.float32))


def groups_of(articles: list[str], count: int) -> list[list[str]]:
    texts = sentences(articles)
    return [[next(texts) for _ in range(SENTENCES)] for _ in range(count)]


def add_voice(corpus: Corpus, voice: Joe | Kokoro, language: str, name: str, groups: Sequence[list[str]]) -> None:
    for number, group in enumerate(groups, 1):
        corpus.add(
            f"{language}-{name}-{number}", language, name, "synthesized",
            lambda g=group: synthesize(voice, language, g),
        )  # fmt: skip


def add_synthesized(corpus: Corpus, calibration: Corpus) -> None:
    phonemes = Phonemes()
    splits, joe = split_articles(wikipedia_articles()), Joe(phonemes)
    prepared = groups_of(splits.calibration, CALIBRATION_FILES * (1 + len(CALIBRATION_VOICES)))
    add_voice(calibration, joe, "en", "joe", prepared[:CALIBRATION_FILES])
    for number, name in enumerate(CALIBRATION_VOICES, 1):
        part = prepared[number * CALIBRATION_FILES : (number + 1) * CALIBRATION_FILES]
        add_voice(calibration, Kokoro(phonemes, name), "en", name, part)
    groups = groups_of(splits.test, JOE_FILES + KOKORO_FILES)
    add_voice(corpus, joe, "en", "joe", groups[:JOE_FILES])
    plan = [("en", "jf_alpha", groups[JOE_FILES:])]
    passages = [re.split(r"(?<=\.) ", text) for text in json.loads(TEXTS.read_text())["es"]]
    plan += [("es", voice, passages) for voice in ("jf_tebukuro", "jm_kumo")]
    for language, name, groups in plan:
        add_voice(corpus, Kokoro(phonemes, name), language, name, groups)


def add_packaged(corpus: Corpus) -> None:
    corpus.add(
        "en-beckett", "en", "beckett", "recorded", lambda: [Spoken(BECKETT, read_audio(fetch_file("speech-sample")))]
    )


def add_repositories(corpus: Corpus, root: Path) -> None:
    def one(text: str, path: Path) -> Callable[[], list[Spoken]]:
        return lambda: [Spoken(text, read_audio(path))]

    corpus.add("en-kennedy", "en", "kennedy", "recorded", one(KENNEDY, root / "whisper/tests/jfk.flac"))
    librivox = root / "pocketsphinx/test/data/librivox"
    for line in (librivox / "transcription").read_text().splitlines():
        if match := re.fullmatch(r"<s> (.+) </s> \((.+)\)", line.strip()):
            # Its transcript says "a" twice, for a reader's slip that is in the clip.
            corpus.add(
                f"en-librivox-{match[2][-4:]}",
                "en",
                "librivox",
                "recorded",
                one(match[1], librivox / f"{match[2]}.wav"),
            )
    clips = root / "TTS/tests/data/ljspeech/wavs"
    lines = json.loads(TEXTS.read_text())["ljspeech"]
    corpus.add(
        "en-ljspeech", "en", "ljspeech", "recorded",
        lambda: [Spoken(text, read_audio(clips / f"LJ001-{n:04}.flac")) for n, text in enumerate(lines, 1)],
    )  # fmt: skip


def add_announcements(corpus: Corpus, calibration: Corpus, root: Path) -> None:
    for language, folder in (("en", "en_US_f_Allison"), ("es", "es_MX_f_Allison")):
        texts = root / f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
        found: dict[str, Path] = {}
        for line in gzip.decompress(texts.read_bytes()).decode().splitlines():
            name, _, text = line.partition(": ")
            path = root / "usr/share/asterisk/sounds" / folder / f"{name}.wav"
            plain = not re.search(r"[\[\]\d(]|\.\.\.", text) and len(text.split()) >= PROMPT_WORDS
            if plain and path.is_file():
                found.setdefault(text.strip(), path)
        prompts = list(found.items())
        for number in range(len(prompts) // PROMPTS):
            group = prompts[number * PROMPTS : (number + 1) * PROMPTS]
            (corpus if number < PROMPT_FILES else calibration).add(
                f"{language}-announcements-{number + 1}", language, "allison", "recorded",
                lambda g=group: [Spoken(text, read_audio(path)) for text, path in g],
            )  # fmt: skip


def total(lines: Sequence[Any]) -> str:
    minutes: dict[tuple[str, str], float] = {}
    for line in lines:
        kind = line["language"], line["kind"]
        minutes[kind] = minutes.get(kind, 0.0) + line["seconds"] / 60
    parts = [f"{language} {kind} {each:.1f}" for (language, kind), each in sorted(minutes.items())]
    return f"{sum(minutes.values()):.1f} minutes: {', '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=cai_home() / "speech-corpus", metavar="DIR")
    parser.add_argument("--repositories", type=Path, metavar="DIR", help="clones: whisper, pocketsphinx, TTS")
    parser.add_argument("--debian", type=Path, metavar="DIR", help="where Debian's sound packages were unpacked")
    args = parser.parse_args()
    corpus, calibration = Corpus(args.out), Corpus(args.out / "calibration")
    add_packaged(corpus)
    if args.repositories is not None:
        add_repositories(corpus, args.repositories)
    if args.debian is not None:
        add_announcements(corpus, calibration, args.debian)
    add_synthesized(corpus, calibration)
    for each in (corpus, calibration):
        print(f"{each.directory}: {total(list(each.lines.values()))}")


if __name__ == "__main__":
    main()
