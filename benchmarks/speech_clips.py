"""Makes clips of English speech with transcripts from Debian packages, for compress_speech.py.

    apt-get install flite asterisk-core-sounds-en-wav pocketsphinx-testdata
    python benchmarks/speech_clips.py DIR

DIR/synthetic/{calibration,judged}: flite speaks sentences of the Wikipedia sample. Calibration uses the first half of its
articles, evaluation the last quarter. The voices slt, rms and awb take turns; a clip lasts up to 25 s. Sentences with digits
or foreign letters are left out, because their spoken form has no unique spelling.
DIR/prompts/{calibration,judged}: announcements of a telephone exchange, read by a person, at 8 kHz, in turn.
DIR/recordings: five sentences from "Sense and Sensibility", read by a volunteer, and the speech sample. You may add other
recordings.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cai_runtime.audio.files import RATE, read_audio
from cai_runtime.convert.sources import fetch_file
from cai_runtime.convert.texts import split_articles, wikipedia_articles

VOICES = ("slt", "rms", "awb")
SECONDS = 25.0  # longest synthetic clip
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
PLAIN = re.compile(r"[A-Z][A-Za-z ,;'-]+[.!?]")
PROMPT_WORDS = 5  # fewest words of an announcement


def sentences(articles: list[str]) -> Iterator[str]:
    """Sentences of one line of letters and simple punctuation, 8 to 30 words."""
    for article in articles:
        for line in article.splitlines():
            for sentence in SENTENCE.split(line.strip()):
                if PLAIN.fullmatch(sentence) and 8 <= len(sentence.split()) <= 30:
                    yield sentence


def say(text: str, voice: str, flite: str) -> object:
    """flite's speech of the text, fp32 [samples] at 16 kHz."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "a.wav"
        subprocess.run([flite, "-voice", voice, "-t", text, "-o", str(out)], check=True, capture_output=True)
        return read_audio(out)


def write_synthetic(folder: Path, articles: list[str], count: int, flite: str) -> None:
    import numpy as np
    import soundfile

    folder.mkdir(parents=True)
    spoken = sentences(articles)
    waiting: list[str] = []
    for number in range(count):
        voice, texts, sounds = VOICES[number % len(VOICES)], [], []
        length = 0.0
        while True:
            text = waiting.pop() if waiting else next(spoken, None)
            if text is None:
                break
            sound = np.asarray(say(text, voice, flite))
            if texts and length + len(sound) / RATE > SECONDS:
                waiting.append(text)
                break
            texts.append(text)
            sounds.append(sound)
            length += len(sound) / RATE
        if not texts:
            return
        soundfile.write(folder / f"{number:03d}-{voice}.flac", np.concatenate(sounds), RATE)
        (folder / f"{number:03d}-{voice}.txt").write_text(" ".join(texts) + "\n")


def write_prompts(folder: Path, root: Path) -> None:
    sounds = next((root / "usr/share/asterisk/sounds").glob("en_US*"))
    texts = root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    number = 0
    for line in gzip.decompress(texts.read_bytes()).decode().splitlines():
        name, _, text = line.partition(": ")
        source = sounds / f"{name}.wav"
        spoken = text and not re.search(r"[\[\]\d(]|\.\.\.", text) and len(text.split()) >= PROMPT_WORDS
        if not spoken or not source.is_file():
            continue
        into = folder / ("calibration" if number % 2 == 0 else "judged")
        into.mkdir(parents=True, exist_ok=True)
        flat = name.replace("/", "-")
        shutil.copyfile(source, into / f"{flat}.wav")
        (into / f"{flat}.txt").write_text(text.strip() + "\n")
        number += 1


def write_recordings(folder: Path, root: Path) -> None:
    folder.mkdir(parents=True)
    source = root / "usr/share/pocketsphinx/test/data/librivox"
    for line in (source / "transcription").read_text().splitlines():
        if match := re.fullmatch(r"<s> (.+) </s> \((.+)\)", line.strip()):
            shutil.copyfile(source / f"{match[2]}.wav", folder / f"{match[2]}.wav")
            (folder / f"{match[2]}.txt").write_text(match[1] + "\n")
    shutil.copyfile(fetch_file("speech-sample"), folder / "beckett.wav")
    (folder / "beckett.txt").write_text("Ever tried. Ever failed. No matter. Try again. Fail again. Fail better.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the packages were unpacked (default /)")
    parser.add_argument("--flite", default="flite", metavar="PROGRAM")
    parser.add_argument("--calibration", type=int, default=96, metavar="N", help="synthetic clips (default 96)")
    parser.add_argument("--judged", type=int, default=24, metavar="N", help="synthetic clips (default 24)")
    args = parser.parse_args()
    articles = split_articles(wikipedia_articles())
    write_synthetic(args.out / "synthetic/calibration", articles.calibration, args.calibration, args.flite)
    write_synthetic(args.out / "synthetic/judged", articles.test, args.judged, args.flite)
    write_prompts(args.out / "prompts", args.root)
    write_recordings(args.out / "recordings", args.root)


if __name__ == "__main__":
    main()
