"""Files and parameters of `client.audio.transcriptions`."""

import io

import numpy as np
import openai
import pytest
from refusals import refused

import cai_runtime
from cai_runtime.api.transcriptions import languages
from cai_runtime.audio.vad import VadOptions
from cai_runtime.speech.options import TEMPERATURES, Options


class TestFiles:
    @pytest.fixture
    def files(self, hearing, speech):
        def got(**given):
            hearing.audio.transcriptions.create(**given)
            return speech.files[-1]

        return got

    def test_forms(self, files, tmp_path, monkeypatch):
        path = tmp_path / "talk.mp3"
        path.write_bytes(b"w")
        for given in (path, str(path)):
            assert files(file=given).name == str(path)
        with path.open("rb") as file:
            assert files(file=file).name == str(path)
        assert files(file=b"w").name is None and files(file=bytearray(b"w")).source == b"w"
        for given in (("a.wav", b"w"), ("a.wav", io.BytesIO(b"w"), "audio/wav"), ("a.wav", path, None, {})):
            assert files(file=given).name == "a.wav"
        assert files(file=(None, b"w")).name is None

    def test_arrays(self, hearing, speech, monkeypatch):
        import cai_runtime.api.transcriptions as endpoint

        monkeypatch.setattr(
            endpoint, "begin_work", lambda file, *rest: speech(type(file)(b"w"), *rest) if seen(file) else 0
        )
        found = []

        def seen(file):
            found.append(file)
            return True

        samples = np.zeros(8000, np.float32)
        hearing.audio.transcriptions.create(file=samples, rate=8000)
        hearing.audio.transcriptions.create(file=(samples, np.int64(44100)))
        assert [file.rate for file in found] == [8000, 44100] and all(file.source is samples for file in found)
        create = hearing.audio.transcriptions.create
        refused(lambda: create(file=samples), "rate")
        refused(lambda: create(file=(samples, 8000), rate=8000), "rate")
        refused(lambda: create(file=(samples, 0)), "rate")
        refused(lambda: create(file=(samples, 1.5)), "file")
        refused(lambda: create(file=samples, rate=-1), "rate")
        refused(lambda: create(file=b"w", rate=8000), "rate")

    @pytest.mark.parametrize("wrong", [3, 1.5, [0.1, 0.2], {"a": 1}, object(), ("a", 3), (3, b"x"), ("a",), (), True])
    def test_what_is_no_file(self, hearing, factory, wrong):
        refused(lambda: hearing.audio.transcriptions.create(file=wrong), "file", "invalid_type")
        assert factory.opened == []  # it is told before a model is loaded

    def test_no_file(self, hearing):
        for given in ({}, {"file": None}, {"file": openai.NOT_GIVEN}):
            refused(
                lambda given=given: hearing.audio.transcriptions.create(**given), "file", "missing_required_parameter"
            )


class TestOptions:
    @pytest.fixture
    def options(self, hearing, speech):
        def got(**given):
            hearing.audio.transcriptions.create(file=b" ", **given)
            return speech.options[-1]

        return got

    def test_nothing_given(self, options):
        assert options() == Options()

    def test_openais(self, options):
        assert options(prompt="Names: Ada").initial_prompt == "Names: Ada"
        assert options(keywords=["Ada", "Bayes rule"]).hotwords == "Ada, Bayes rule"
        assert options(chunking_strategy="auto").vad == {}
        vad = {"type": "server_vad", "threshold": np.float64(0.25), "silence_duration_ms": 300, "prefix_padding_ms": 20}
        found = VadOptions.of(options(chunking_strategy=vad).vad)
        assert found == VadOptions.server(threshold=0.25, silence_duration_ms=300, prefix_padding_ms=20)
        assert options(languages=["english", "de"]).languages == ("en", "de")
        assert not options(timestamp_granularities=["segment"]).word_timestamps

    @pytest.mark.parametrize(
        ("given", "tried"),
        [(0, TEMPERATURES), (0.0, TEMPERATURES), (0.3, (0.3,)), ([0], (0.0,)), ([0, 0.5], (0.0, 0.5)),
         (np.float32(0.5), (0.5,)), (np.array([0.25, 1]), (0.25, 1.0))],
    )  # fmt: skip
    def test_temperature(self, options, given, tried):
        assert options(temperature=given).temperature == tried

    @pytest.mark.parametrize("name", ["json", "verbose_json", "text", "srt", "vtt"])
    def test_every_format_gives_the_verbose_object(self, hearing, name):
        assert hearing.audio.transcriptions.create(file=b"w", response_format=name).segments[0].text == " xyz"
        assert hearing.audio.translations.create(file=b"w", response_format=name).segments

    def test_ours_are_the_speech_packages(self, options):
        ours = {
            "beam_size": 2, "best_of": 3, "patience": 2.0, "length_penalty": 0.5, "repetition_penalty": 1.1,
            "no_repeat_ngram_size": 3, "compression_ratio_threshold": 2.0, "log_prob_threshold": -0.5,
            "no_speech_threshold": 0.5, "condition_on_previous_text": False, "prompt_reset_on_temperature": 0.4,
            "prefix": "So", "hotwords": "Ada", "suppress_blank": False, "suppress_tokens": (-1, 5),
            "without_timestamps": True, "max_initial_timestamp": 2.0, "max_new_tokens": 100, "word_timestamps": True,
            "prepend_punctuations": "(", "append_punctuations": ")", "hallucination_silence_threshold": 2.0,
            "vad": {"threshold": 0.3}, "batched": True, "windows_together": 4, "clip_timestamps": (1.0, 2.0), "seed": 3,
            "multilingual": True, "initial_prompt": "Hello",
        }  # fmt: skip
        assert options(**ours) == Options(**ours)
        served = set(cai_runtime.api.transcriptions.params.SpeechParams.__annotations__)
        assert set(Options.__dataclass_fields__) - served == {"task"}

    @pytest.mark.parametrize(
        ("wrong", "param"),
        [({"temperature": 1.5}, "temperature"), ({"temperature": "hot"}, "temperature"),
         ({"temperature": []}, "temperature"), ({"temperature": [0, -1]}, "temperature"),
         ({"temperature": float("nan")}, "temperature"), ({"temperature": True}, "temperature"),
         ({"response_format": "diarized_json"}, "response_format"), ({"response_format": "xml"}, "response_format"),
         ({"response_format": 3}, "response_format"),
         ({"timestamp_granularities": ["letter"]}, "timestamp_granularities"),
         ({"timestamp_granularities": "word"}, "timestamp_granularities"),
         ({"chunking_strategy": "none"}, "chunking_strategy"),
         ({"chunking_strategy": {"threshold": 0.5}}, "chunking_strategy"),
         ({"chunking_strategy": {"type": "server_vad", "threshold": 2}}, "chunking_strategy"),
         ({"chunking_strategy": {"type": "server_vad", "x": 2}}, "chunking_strategy"),
         ({"keywords": "Ada"}, "keywords"), ({"keywords": [""]}, "keywords"), ({"languages": "en"}, "languages"),
         ({"languages": ["xx"]}, "languages"), ({"languages": ["auto"]}, "languages"),
         ({"languages": ["fr"]}, "languages"), ({"include": ["logprobs"]}, "include"),
         ({"known_speaker_names": ["a"]}, "known_speaker_names"), ({"beam_size": 0}, "beam_size"),
         ({"beam_size": "5"}, "beam_size"), ({"beam_size": True}, "beam_size"), ({"best_of": 0}, "best_of"),
         ({"patience": 0}, "patience"), ({"length_penalty": "x"}, "length_penalty"), ({"vad": 3}, "vad"),
         ({"vad": {"x": 1}}, "vad"), ({"vad": {"threshold": 2}}, "vad"),
         ({"vad": True, "chunking_strategy": "auto"}, "vad"),
         ({"prompt": "a", "initial_prompt": "b"}, "initial_prompt"),
         ({"keywords": ["a"], "hotwords": "b"}, "hotwords"), ({"prompt": 3}, "prompt"),
         ({"initial_prompt": 3}, "initial_prompt"), ({"stream": "yes"}, "stream"),
         ({"clip_timestamps": [3, 2]}, "clip_timestamps"), ({"seed": 1.5}, "seed"),
         ({"suppress_tokens": "x"}, "suppress_tokens"),
         ({"hallucination_silence_threshold": 2}, "hallucination_silence_threshold"), ({"timeout": 0}, "timeout"),
         ({"prompt": "\ud800"}, "prompt"), ({"nothing": 1}, "nothing"), ({"max_tokens": 3}, "max_tokens"),
         ({"extra_body": {"beam_size": 0}}, "beam_size")],
    )  # fmt: skip
    def test_hostile_values_are_named(self, hearing, wrong, param):
        error = refused(lambda: hearing.audio.transcriptions.create(file=b"w", **wrong), param)
        assert param in error.message

    def test_values_that_ask_for_nothing(self, hearing):
        nothing = {"include": [], "known_speaker_names": [], "known_speaker_references": []}
        assert hearing.audio.transcriptions.create(file=b"w", **nothing, stream=False, languages=[]).text == "xyz"

    def test_language(self, options, hearing):
        assert options().language is options(language="auto").language is options(language=" Auto ").language is None
        for given in ("de", "DE", "german", "German", "de-AT", "de_CH"):
            assert options(language=given).language == "de"
        assert options(language="cantonese").language == "yue"
        create = hearing.audio.transcriptions.create
        error = refused(lambda: create(file=b"w", language="french"), "language", match="does not know 'french'")
        assert "de (german), en (english), yue (cantonese)" in error.message
        refused(lambda: create(file=b"w", language="klingon"), "language", match="a language's code or name")

    def test_models_that_know_english_alone(self, hearing, speech):
        create = hearing.audio.transcriptions.create
        for given in ({}, {"language": "auto"}, {"language": "english"}, {"language": "en-US"}):
            assert create(model="whisper.en", file=b"w", **given).language == "en"
            assert speech.options[-1].language == "en"
        refused(lambda: create(model="whisper.en", file=b"w", language="de"), "language", match="English alone")
        refused(
            lambda: hearing.audio.translations.create(model="whisper.en", file=b"w"),
            "model", "translation_not_supported", match="supports_translation",
        )  # fmt: skip


def test_the_languages_are_whispers():
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    assert languages.LANGUAGES == LANGUAGES
    assert all(languages.language_code(name, "language") == code for name, code in TO_LANGUAGE_CODE.items())
