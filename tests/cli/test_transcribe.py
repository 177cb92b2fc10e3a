"""`cai transcribe` over a fake speech model whose audio is text; see tests/helpers/fake_speech.py."""

import io
import json
from types import SimpleNamespace

import pytest
from fake_speech import GENERATION, FakeSpeech, make_speech_dir
from openai.types.audio import TranscriptionVerbose

from cai_runtime.cli import main
from cai_runtime.progress import NoBar


@pytest.fixture
def speech(monkeypatch):
    import cai_runtime.api.transcriptions as endpoint
    import cai_runtime.client as client

    fake = FakeSpeech(engine=False)
    engine = SimpleNamespace(alive=True, tokenizer=None, close=lambda: None)
    monkeypatch.setattr(endpoint, "begin_work", fake)
    monkeypatch.setattr(client, "_open_engine", lambda path, **options: engine)
    return fake


@pytest.fixture
def model(tmp_path):
    return ["--model", str(make_speech_dir(tmp_path / "model"))]


@pytest.fixture
def talk(tmp_path):
    """Makes an audio file; called with its name and what is said in it."""
    (tmp_path / "talks").mkdir()

    def make(name, said="abc"):
        path = tmp_path / "talks" / name
        path.write_text(said)
        return str(path)

    return make


def test_outputs_lie_beside_the_files(speech, model, talk, tmp_path, capsys):
    files = [talk(f"{i}.mp3", "ab"[: 1 + i % 2]) for i in range(20)]
    assert main(["transcribe", *files, *model, "--together", "3"]) == 0
    assert capsys.readouterr() == ("", "20 transcribed, 0 failed\n")
    for i in range(20):
        assert (tmp_path / "talks" / f"{i}.txt").read_text() == "A\nB\n"[: 2 + 2 * (i % 2)]
    assert len(list((tmp_path / "talks").iterdir())) == 40  # no partial file is left


def test_every_format(speech, model, talk, tmp_path):
    file, out = talk("a.b.wav", "a b"), tmp_path / "new" / "folder"
    for name, suffix in {"text": "txt", "srt": "srt", "vtt": "vtt", "tsv": "tsv", "json": "json"}.items():
        assert main(["transcribe", file, *model, "--format", name, "--output", str(out)]) == 0
        assert (out / f"a.b.{suffix}").read_text()
    assert (out / "a.b.srt").read_text().startswith("1\n00:00:00,000 --> 00:00:02,400\nA\n\n2\n00:00:05,000")
    assert (out / "a.b.tsv").read_text() == "start\tend\ttext\n0\t2400\tA\n5000\t7400\tB\n"
    reply = TranscriptionVerbose.model_validate_json((out / "a.b.json").read_text(), strict=True)
    assert (reply.text, reply.duration) == ("A B", 7.5)


def test_one_file_to_standard_output(speech, model, talk, capsys, monkeypatch):
    assert main(["transcribe", talk("a.mp3"), *model, "--output", "-"]) == 0
    assert capsys.readouterr() == ("A\nB\nC\n", "")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"x")))
    assert main(["transcribe", "-", *model, "--format", "vtt"]) == 0
    assert capsys.readouterr().out == "WEBVTT\n\n00:00:00.000 --> 00:00:02.400\nX\n"


def test_a_second_run_does_what_is_missing(speech, model, talk, tmp_path, capsys):
    one, two = talk("one.mp3"), talk("two.mp3")
    (tmp_path / "talks" / "one.txt").write_text("done before\n")
    assert main(["transcribe", one, two, *model]) == 0
    assert "1 transcribed, 0 failed, 1 skipped" in capsys.readouterr().err
    assert (tmp_path / "talks" / "one.txt").read_text() == "done before\n"
    assert main(["transcribe", one, two, *model]) == 0
    assert "0 transcribed, 0 failed, 2 skipped" in capsys.readouterr().err and len(speech.files) == 1
    assert main(["transcribe", one, *model, "--force"]) == 0
    assert (tmp_path / "talks" / "one.txt").read_text() == "A\nB\nC\n"


def test_a_bad_file_fails_alone_and_damage_is_told(speech, model, talk, tmp_path, capsys):
    files = [talk("good.mp3"), talk("cut.mp3", "ab!"), talk("empty.mp3", ""), talk("damaged.mp3", "a?"), "nothing.mp3"]
    assert main(["transcribe", *files, *model]) == 1
    said = capsys.readouterr().err
    assert f"error: {files[1]}: the audio ends after 5.0 s" in said and f"error: {files[2]}: the audio is empty" in said
    assert f"warning: {files[3]}: the last frame is cut" in said and "error: nothing.mp3: " in said
    assert said.endswith("2 transcribed, 3 failed\n")
    assert sorted(path.name for path in (tmp_path / "talks").glob("*.txt")) == ["damaged.txt", "good.txt"]


def test_an_output_that_can_t_be_written_fails_its_file_alone(speech, model, talk, tmp_path, capsys):
    (tmp_path / "talks" / "a.txt").mkdir()
    assert main(["transcribe", talk("a.mp3"), talk("b.mp3"), *model, "--force"]) == 1
    assert "1 transcribed, 1 failed" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "talks").iterdir()) == ["a.mp3", "a.txt", "b.mp3", "b.txt"]


def test_options_reach_the_request(speech, model, talk):
    given = (
        "--language german --prompt Ada --hotwords Bayes --temperature 0,0.4 --beam-size 2 --best-of 3 --patience 2 "
        "--length-penalty 0.5 --no-speech-threshold 0.5 --log-prob-threshold -0.5 --compression-ratio-threshold 2 "
        "--windows-together 3 --clip-timestamps 1,2 --seed 4 --word-timestamps --vad --batched "
        "--no-condition-on-previous-text --task translate"
    )
    assert main(["transcribe", talk("a.mp3"), *model, *given.split()]) == 0
    (options,) = speech.options
    expected = {
        "task": "translate", "language": "de", "initial_prompt": "Ada", "hotwords": "Bayes", "temperature": (0, 0.4),
        "beam_size": 2, "best_of": 3, "patience": 2, "length_penalty": 0.5, "no_speech_threshold": 0.5,
        "log_prob_threshold": -0.5, "compression_ratio_threshold": 2, "windows_together": 3, "clip_timestamps": (1, 2),
        "seed": 4, "word_timestamps": True, "vad": {}, "batched": True, "condition_on_previous_text": False,
    }  # fmt: skip
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--beam-size", "0"], "beam_size"), (["--language", "klingon"], "language"), (["--together", "0"], "--together"),
     (["--temperature", "2"], "temperature"), (["--model", "nothing"], "nothing"), (["--timeout", "0"], "timeout")],
)  # fmt: skip
def test_what_concerns_every_file_is_told_once(speech, model, talk, capsys, options, said):
    assert main(["transcribe", talk("a.mp3"), talk("b.mp3"), *model, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_model_that_answers_text_is_refused(speech, talk, tiny_dir, capsys):
    assert main(["transcribe", talk("a.mp3"), "--model", str(tiny_dir)]) == 1
    assert "supports_audio" in capsys.readouterr().err


def test_outputs_that_would_be_one_file_are_refused(speech, model, talk, tmp_path, capsys):
    both = [talk("a.mp3"), talk("a.wav")]
    assert main(["transcribe", *both, *model]) == 1
    assert "--keep-suffix" in capsys.readouterr().err and not speech.files
    assert main(["transcribe", *both, *model, "--keep-suffix"]) == 0
    assert (tmp_path / "talks" / "a.wav.txt").exists()
    assert main(["transcribe", talk("b.txt"), *model]) == 1  # audio of an odd name: its output would replace it
    assert main(["transcribe", *both, *model, "--output", "-"]) == 1
    assert main(["transcribe", "-", both[0], *model]) == 1
    assert main(["transcribe", both[0], both[0], *model, "--format", "srt"]) == 0  # one file, twice


def test_the_default_is_the_largest_model_that_was_fetched(speech, talk, home, capsys):
    from cai_runtime.convert.cache import entry

    assert main(["transcribe", talk("a.mp3")]) == 1
    assert "cai pull whisper-tiny.en" in capsys.readouterr().err
    for name, size in {"hf://small": 10, "hf://large": 30, "hf://text": 90}.items():

        def build(directory, name=name, size=size):
            (directory / "config.json").write_text(json.dumps({"model_type": "llama" if "text" in name else "whisper"}))
            (directory / "generation_config.json").write_text(json.dumps(GENERATION))
            (directory / "model.safetensors").write_bytes(b"0" * size)

        entry("models", name[5:], name, build)
    assert main(["transcribe", talk("a.mp3")]) == 0
    from cai_runtime.cli.transcribe import _largest

    assert _largest() == "hf://large"


def test_progress_counts_seconds_of_audio(speech, model, talk, capsys, monkeypatch):
    from cai_runtime.cli import transcribe

    counted = []

    class Bar(NoBar):
        def update(self, n=1.0):
            counted.append(n)

    monkeypatch.setattr(transcribe, "_durations", lambda args, jobs: {job.name: 7.5 for job in jobs})
    monkeypatch.setattr(
        "cai_runtime.progress.progress_bar", lambda *args, total, **more: counted.append(-total) or Bar()
    )
    assert main(["transcribe", talk("a.mp3"), talk("cut.mp3", "a!c"), *model]) == 1
    assert counted[0] == -15 and sum(counted) == pytest.approx(0) and min(counted[1:]) >= 0


def test_ctrl_c_says_how_to_go_on(speech, model, talk, capsys, monkeypatch):
    from cai_runtime.cli import transcribe

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(transcribe, "_write", interrupted)
    assert main(["transcribe", talk("a.mp3"), *model]) == 130
    assert "goes on from there" in capsys.readouterr().err
    assert speech.streams[0].closed
