"""A Whisper through every stage: two stacks, texts of its own, resumed anywhere to the same bits; and how it is judged."""

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cai_runtime.audio.files import Clip, split_clips
from cai_runtime.compressor import compress, dry_run
from cai_runtime.compressor.data.speech import speech_samples
from cai_runtime.compressor.elastic.heal import ElasticHealer
from cai_runtime.compressor.stats.block_stack import open_model
from cai_runtime.compressor.stats.calibrate import BlockId, CalibrationPass, next_token_loss
from cai_runtime.compressor.stats.targets import find_targets
from cai_runtime.compressor.stats.weights import DenseWeights
from cai_runtime.compressor.train.heal import WINDOWS
from cai_runtime.compressor.work import Work
from cai_runtime.errors import CompressionError
from cai_runtime.judge import speech_evaluation
from cai_runtime.judge.speech_evaluation import _generate, compare_speech, english_words, word_errors
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.stock.load import dense_reference, slim_as_transformers
from cai_runtime.stock.speech_input import load_processor, speech_batch
from cai_runtime.stock.transcribe import Prompts, encode, prompt_of, transcribe

SETTINGS = {
    "keep": 0.9,
    "samples": 6,
    "sequence_length": 16,
    "rank_multiple": 1,
    "shift": True,
    "refine_epochs": 1,
    "heal_tokens": 2 * 16 * 3,
    "progress": False,
}


@pytest.fixture(scope="module")
def batches(whisper):
    g = torch.Generator().manual_seed(1)
    features = torch.randn(3, 16, 200, generator=g)
    tokens = [torch.cat([torch.tensor([257, 259]), torch.randint(0, 256, (n,), generator=g)]) for n in (5, 9, 7)]
    return [speech_batch(f, t, 2) for f, t in zip(features, tokens, strict=True)]


@pytest.fixture
def calibration(whisper, batches, tmp_path):
    with Checkpoint.open(whisper) as checkpoint:
        weights = DenseWeights(checkpoint)
        model = open_model(weights, dtype=torch.float32, device="cpu")
        targets = find_targets(model.model, [stack.name for stack in model.stacks], weights)
        yield CalibrationPass(model, targets, batches, Work(tmp_path / "work", {})), dense_reference(whisper)


def inputs(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


def test_block_by_block_it_is_the_model(calibration, batches):
    calibration, reference = calibration
    assert [stack.name for stack in calibration.model.stacks] == ["model.encoder.layers", "model.decoder.layers"]
    calibration.forward()
    for number, batch in enumerate(batches):
        finals = [calibration.hidden(BlockId(s, 2), only=number)[0] for s in (0, 1)]
        with torch.no_grad():
            wanted = reference(**inputs(batch), use_cache=False).logits
        assert torch.equal(calibration.model.finish(batch, finals).logits, wanted)


def test_moments_of_both_stacks_are_those_of_one_backward_pass(calibration, batches):
    calibration, reference = calibration
    calibration.forward()
    found = {}
    calibration.backward(lambda at: found.update({at: calibration.moments(at, gradients=True)[1]}))
    seen: dict[str, list] = {}
    for name, module in reference.named_modules():
        if any(name in moments.inputs for moments in found.values()):

            def hook(_module, args, out, name=name):
                out.requires_grad_() if not out.requires_grad else None
                out.retain_grad()
                seen.setdefault(name, []).append((args[0], out))

            module.register_forward_hook(hook)
    reference.requires_grad_(True)
    for batch in batches:
        next_token_loss(reference(**inputs(batch), use_cache=False), batch).backward()
    assert len(seen) == 2 * 6 + 2 * 10
    for at, moments in found.items():
        assert len(moments.inputs) == (6 if at.stack == 0 else 10)
        for name, gram in moments.inputs.items():
            x = torch.cat([pair[0].detach().flatten(0, 1) for pair in seen[name]]).double()
            g = torch.cat([pair[1].grad.flatten(0, 1) for pair in seen[name]]).double()
            assert moments.rows[name] == len(x)
            torch.testing.assert_close(gram, x.mT @ x / len(x), rtol=1e-5, atol=1e-7, check_dtype=False)
            torch.testing.assert_close(
                moments.outputs[name], g.mT @ g / len(g), rtol=1e-3, atol=1e-9, check_dtype=False
            )


class Killed(BaseException):
    """What no handler expects."""


def test_stopped_anywhere_it_comes_to_the_same_bits(whisper, speech, tmp_path, monkeypatch):
    report = compress(whisper, tmp_path / "whole", calibration=speech, **SETTINGS)
    expected = (tmp_path / "whole/model.safetensors").read_bytes()
    assert report.keep_parameters <= 0.9 and len(report.modules) == 32 and len(report.healing) == 3
    assert [block["name"] for block in report.blocks] == [
        f"model.{side}.layers.{k}" for side in ("encoder", "decoder") for k in (0, 1)
    ]
    assert all(block["after"] <= block["before"] for block in report.blocks)
    assert report.calibration["set_aside"] == 1 and report.calibration["calibrated_on"] == 6
    assert report.quality["audio"]["clips"] == 1 and report.quality["divergence"]["positions"] > 0

    save = Work.save
    done: list[str] = []

    def save_some(self, step, *rest, **options):
        if len(done) >= 4 and (not self.has(step) or options.get("again")):
            raise Killed
        done.append(step)
        save(self, step, *rest, **options)

    monkeypatch.setattr(Work, "save", save_some)
    for _ in range(40):
        try:
            compress(whisper, tmp_path / "slim", calibration=speech, evaluate=False, **SETTINGS)
            break
        except Killed:
            assert not (tmp_path / "slim").exists()
            done.clear()
    assert (tmp_path / "slim/model.safetensors").read_bytes() == expected
    assert {entry.name for entry in tmp_path.iterdir()} == {"slim", "whole"}


def test_an_exact_compression_is_the_model(whisper, speech, batches, tmp_path):
    exact = {**SETTINGS, "keep": 1.0, "refine_epochs": 0, "heal_tokens": 0}
    compress(whisper, tmp_path / "slim", calibration=speech, store="fp32", evaluate=False, **exact)
    for batch in batches:
        with torch.no_grad():
            a, b = (
                model(**inputs(batch)).logits
                for model in (dense_reference(whisper), slim_as_transformers(tmp_path / "slim"))
            )
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_transformers_loads_and_runs_it(whisper, speech, batches, tmp_path):
    from transformers import AutoModelForSpeechSeq2Seq

    fast = {**SETTINGS, "refine_epochs": 0, "heal_tokens": 0, "shift": False}
    compress(whisper, tmp_path / "slim", calibration=speech, evaluate=False, **fast)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "slim", dtype=torch.float32)
    judge = slim_as_transformers(tmp_path / "slim")
    with torch.no_grad():
        a, b = (m(**inputs(batches[0])).logits for m in (model, judge))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    features = batches[0]["input_features"]
    assert torch.equal(model.generate(features, max_new_tokens=5), judge.generate(features, max_new_tokens=5))


def test_without_audio_it_is_said_what_to_give(whisper, text_file, tmp_path):
    for source, message in (
        (None, "give files, a directory"),
        ("self", "--calibration DIR"),
        (text_file, "takes audio"),
    ):
        with pytest.raises(CompressionError, match=message):
            compress(whisper, tmp_path / "slim", calibration=source, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_the_windows(whisper, speech, tmp_path):
    plan, _ = dry_run(whisper, tmp_path / "slim", calibration=str(speech), keep=0.9, rank_multiple=1, samples=6)
    assert (plan.blocks, plan.layers) == (4, 32)
    assert plan.state_bytes >= 6 * 100 * 32 * 4 * 4
    assert list(tmp_path.iterdir()) == []


def samples_of(whisper, source, **options):
    return speech_samples(
        source, model=dense_reference(whisper), model_path=whisper, progress=False, **{"samples": 30, **options}
    )


def test_samples_are_given_texts_own_texts_and_further_ones(whisper, speech):
    state, torch_state = random.getstate(), torch.get_rng_state()
    found = samples_of(whisper, speech, seed=3)
    again = samples_of(whisper, speech, seed=3)
    assert found.samples == again.samples and found.to_json() == again.to_json()
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    kept, judged = split_clips(speech)
    assert [clip.path.name for clip in judged] == ["clip09.wav"] and len(kept) == 12
    assert (found.provenance["set_aside"], found.provenance["clips"]) == (1, 13)
    windows = len(found.features)
    # The long clip is cut in pauses, and its windows go without its text.
    assert 11 + 3 <= windows <= 11 + 5 and found.provenance["transcribed"] == 4
    first, more = found.samples[:windows], found.samples[windows:]
    assert sorted(sample.window for sample in first) == list(range(windows)) and len(found.samples) == 30
    tokenizer = load_processor(whisper)[1]
    texts = {tokenizer.decode(s.tokens, skip_special_tokens=True) for s in first}
    assert {" clip 1 says so", " clip 5 says so", " clip 7 says so", " clip 11 says so"} <= texts
    assert {sample.prompt for sample in first} == {1, 2}  # with times and without
    assert all(s.tokens[0] == 257 and (s.tokens[1] == 259) == (s.prompt == 2) for s in found.samples)
    assert len({(s.window, s.tokens) for s in found.samples}) == 30 and {s.window for s in more} <= set(range(windows))
    assert samples_of(whisper, speech, seed=4).samples != found.samples
    assert len(samples_of(whisper, speech, samples=5).features) == 5


def test_greedy_is_what_transformers_generates(whisper, batches):
    model = dense_reference(whisper)
    features = torch.cat([batch["input_features"] for batch in batches])
    prompts = Prompts.of(model)
    encoded = encode(model, features)
    prompt = prompt_of(model, prompts, encoded, times=False)
    wanted = model.generate(features, max_new_tokens=8, do_sample=False).tolist()
    found = transcribe(model, encoded, prompt, most=8)
    for ours, theirs in zip(found, wanted, strict=True):
        # Where a text without times has one all the same, transformers begins anew.
        count = next((k for k, token in enumerate(ours) if token > 259), 8)
        assert ours[:count] == [token for token in theirs if token not in (257, 259)][:count] and count > 0
    alone = transcribe(model, encoded[1:2], prompt[1:2], most=8, temperature=0.7, keys=[5])
    together = transcribe(model, encoded, prompt, most=8, temperature=0.7, keys=[4, 5, 6])
    assert alone[0] == together[1]


@pytest.fixture
def several(polyglot):
    """The model of several languages, and windows in which it hears more than one."""
    g = torch.Generator().manual_seed(2)
    return dense_reference(polyglot), 4 * (torch.randn(8, 16, 200, generator=g) + torch.randn(8, 16, 1, generator=g))


@pytest.mark.parametrize("times", [False, True])
def test_prompts_and_rules_are_those_of_generate(several, times):
    model, features = several
    config, encoded = model.generation_config, encode(model, features)
    config.max_initial_timestamp_index = 30
    most = 12

    def compared():
        prompt = prompt_of(model, Prompts.of(model), encoded, times=times)
        once = {"force_unique_generate_call": True, "return_dict_in_generate": True, "return_timestamps": times}
        wanted = model.generate(features, task="transcribe", max_new_tokens=most, do_sample=False, **once).sequences
        found = transcribe(model, encoded, prompt, most=most)
        for begin, text, whole in zip(prompt, found, wanted.tolist(), strict=True):
            assert begin == whole[: len(begin)] and text == whole[len(begin) :][: len(text)]
            assert text[-1] == config.eos_token_id or len(text) == most
        return prompt, found

    prompt, free = compared()
    assert len({begin[1] for begin in prompt}) > 1  # languages
    assert all(begin[2] == config.task_to_id["transcribe"] and (len(begin) == 3) == times for begin in prompt)
    plain = config.no_timestamps_token_id
    if times:
        assert all(plain < text[0] <= plain + 31 for text in free)
    # What the texts hold and begin with is forbidden.
    words = [token for text in free for token in text if token < config.eos_token_id]
    config.suppress_tokens = sorted({max(set(words), key=words.count)})
    begins = {text[0] for text in free}
    config.begin_suppress_tokens = sorted(begins)
    _, found = compared()
    assert not begins & {text[0] for text in found} and {token for text in found for token in text[1:]} & begins
    assert not set(config.suppress_tokens) & {token for text in found for token in text}
    config.language = "French"
    prompt, _ = compared()
    assert {begin[1] for begin in prompt} == {config.lang_to_id["<|fr|>"]}


def test_what_is_judged_is_told_to_transcribe(several):
    model, features = several
    encoded = encode(model, features)
    assert getattr(model.generation_config, "task", None) is None
    prompts = Prompts.of(model)
    prompt = prompt_of(model, prompts, encoded, times=False)
    wanted = transcribe(model, encoded, prompt, most=model.config.max_target_positions - 4)
    lengths = []
    for ours, theirs in zip(wanted, _generate(model, features), strict=True):
        # Where a text without times has one all the same, transformers begins anew.
        text = [token for token in ours if token != prompts.end]
        lengths.append(next((k for k, token in enumerate(text) if token > prompts.plain), len(text)))
        assert theirs[: lengths[-1]] == text[: lengths[-1]]
    assert sum(length > 3 for length in lengths) >= 3


def test_languages_are_heard_of_a_few_windows_at_once(polyglot, speech, monkeypatch):
    sizes = []
    monkeypatch.setattr(speech_evaluation, "TOGETHER", 2)
    monkeypatch.setattr(
        speech_evaluation, "encode", lambda model, features: (sizes.append(len(features)), encode(model, features))[1]
    )
    found = compare_speech(polyglot, polyglot, audio=speech / "clip03.wav", progress=False)
    assert max(sizes) == 2 and sum(sizes) >= 3 and found.divergence.kl < 1e-6


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [
        ("", "", 0),
        ("a b", "", 2),
        ("", "a b", 2),
        ("a b c", "a x c", 1),
        ("a b c", "a c", 1),
        ("a b c", "b c d", 2),
        ("the cat sat on the mat", "cat sat on a mat here", 3),
    ],
)
def test_word_errors(said, heard, errors):
    assert word_errors(said.split(), heard.split()) == word_errors(heard.split(), said.split()) == errors


def test_a_text_without_end_counts_as_no_more_than_all_words_of_its_clip(whisper, speech, monkeypatch):
    said = ["ask not what your country", "fail better"]
    heard = iter(["ask not what country", "fail better better better better better"])
    tokenizer = load_processor(whisper)[1]
    monkeypatch.setattr(
        speech_evaluation, "_generate", lambda *_: [tokenizer(next(heard), add_special_tokens=False)["input_ids"]]
    )
    clips = [Clip(speech / f"clip{k:02d}.wav", text) for k, text in enumerate(said)]
    score = compare_speech(whisper, audio=clips, progress=False).reference
    assert (score.words, score.errors) == (7, 1 + 4)
    assert (score.word_error, score.word_error_capped) == (5 / 7, (1 + 2) / 7)


def test_words_are_normalized():
    words = english_words()
    assert words("Mr. Smith's dogs -- won't   run!") == words("mister smith's dogs will not run")
    assert words("twenty-one [coughs] days") == ["21", "days"]


def test_a_model_and_itself(whisper, speech, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speech_evaluation, "encode", None)  # nothing is to be heard of the language
    found = compare_speech(whisper, whisper, audio=speech, progress=False)
    assert found.candidate.word_error == found.reference.word_error and found.divergence.word_error == 0
    assert found.divergence.kl < 1e-6 and found.divergence.top1 == 1 and found.divergence.word_error_ratio == 1
    assert found.reference.word_error_capped <= min(1, found.reference.word_error)
    assert found.reference.words == 6 * 4 and found.audio["transcribed"] == 6 and len(found.clips) == 13
    alone = compare_speech(whisper, audio=[clip.path for clip in split_clips(speech)[0] if clip.text is None])
    assert alone.candidate is None and alone.reference.word_error is None
    from cai_runtime.cli.__main__ import main

    output = tmp_path / "out.json"
    assert main(["eval", str(whisper), str(whisper), "--audio", str(speech), "--json", str(output)]) == 0
    assert "word error rate" in capsys.readouterr().out
    assert json.loads(output.read_text())["divergence"]["top1"] == 1


@pytest.mark.parametrize(("count", "judged"), [(9, 0), (10, 1), (19, 1), (640, 64), (645, 64), (5000, 64)])
def test_clips_are_set_aside_evenly_and_not_too_many(monkeypatch, count, judged):
    clips = [Clip(Path(f"{k}.wav")) for k in range(count)]
    monkeypatch.setattr("cai_runtime.audio.files.find_clips", lambda _source: list(clips))
    left, aside = split_clips("anywhere")
    assert len(aside) == judged and sorted([*left, *aside], key=clips.index) == clips
    at = [clips.index(clip) for clip in aside]
    gaps = {b - a for a, b in pairwise([-1, *at])}
    assert gaps <= ({10} if count <= 640 else {count // 64, count // 64 + 1})


def test_a_clip_that_will_be_judged_and_can_not_be_read_is_named_before_the_work(
    whisper, speech, tmp_path, monkeypatch
):
    class Begun(Exception):
        pass

    def begin(*_args, **_options):
        raise Begun

    monkeypatch.setattr("cai_runtime.compressor.data.speech.speech_samples", begin)
    clips = shutil.copytree(speech, tmp_path / "clips")
    (clips / "clip09.wav").write_bytes(b"RIFF, but no more")
    with pytest.raises(CompressionError, match=r"clip09\.wav can't be read"):
        compress(whisper, tmp_path / "slim", calibration=clips, **SETTINGS)
    with pytest.raises(Begun):
        compress(whisper, tmp_path / "slim", calibration=clips, evaluate=False, **SETTINGS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["clips"]


def test_an_elastic_one_is_healed_and_judged_at_its_keeps(whisper, speech, tmp_path, monkeypatch):
    opened, open_one = [], speech_evaluation._open
    monkeypatch.setattr(
        speech_evaluation, "_open", lambda path, *a: (opened.append((path, a[-1])), open_one(path, *a))[1]
    )
    windows, gradients = [], ElasticHealer._gradients
    monkeypatch.setattr(ElasticHealer, "_gradients", lambda *a: (windows.append(a), gradients(*a))[1])
    dst, options = tmp_path / "slim", {**SETTINGS, "keep": 0.9, "shift": False, "refine_epochs": 0, "rank_multiple": 2}
    report = compress(whisper, dst, calibration=speech, elastic=True, smallest_keep=0.5, **options)
    assert len(report.healing) == 3 and len(windows) == WINDOWS * 3
    keeps = [0.9, 0.8, 0.7, 0.6, 0.5]
    assert opened == [(whisper, None), *((dst, keep) for keep in keeps)]
    told = json.loads((dst / "config.json").read_text())["quantization_config"]["elastic"]["quality"]
    assert report.elastic["quality"] == told[::-1] and [entry["keep"] for entry in told] == keeps[::-1]
    assert told[0]["kl"] > told[-1]["kl"] == report.quality["divergence"]["kl"] > 0
    assert report.quality["audio"]["clips"] == 1 and report.quality["candidate"]["keep"] == 0.9
    alone = compare_speech(whisper, dst, audio=split_clips(speech)[1], keep=0.7, progress=False)
    assert told[2] == {
        "keep": 0.7,
        "parameters": alone.candidate.parameters,
        "bytes": alone.candidate.nbytes,
        "word_error": alone.candidate.word_error,
        "kl": alone.divergence.kl,
        "top1": alone.divergence.top1,
    }
    assert json.loads((dst / "slim_report.json").read_text())["elastic"] == report.elastic
    assert "word_error" in report.summary()


def test_a_text_model_hears_nothing(tiny, speech):
    with pytest.raises(CompressionError, match="a llama model, which takes no audio"):
        compare_speech(tiny, audio=speech, progress=False)


@pytest.mark.slow
def test_the_real_one_still_hears(tmp_path):
    """Whisper tiny.en, calibrated on the first half of ten seconds and judged on the second: int8 alone says the same
    words; five seconds are little to choose ranks by, but the tokens stay likely."""
    import soundfile

    from cai_runtime.audio.files import RATE, read_audio
    from cai_runtime.convert.sources import fetch_file, pull

    audio = read_audio(fetch_file("speech-sample", progress=False))
    half = len(audio) // 2
    for name, part in (("calibration", audio[:half]), ("judged", audio[half:])):
        soundfile.write(tmp_path / f"{name}.wav", part, RATE)
    source = pull("whisper-tiny.en", progress=False)
    options = {"refine_epochs": 0, "heal_tokens": 0, "samples": 4, "evaluate": False, "progress": False}
    found = {}
    for keep in (1.0, 0.9):
        slim = tmp_path / f"{keep}"
        report = compress(source, slim, keep=keep, calibration=tmp_path / "calibration.wav", **options)
        assert keep - 0.02 < report.keep_parameters <= keep and report.calibration["sequences"] >= 2
        found[keep] = compare_speech(source, slim, audio=tmp_path / "judged.wav", progress=False)
    assert found[1.0].divergence.kl < 0.02 and found[1.0].divergence.word_error == 0
    assert "fail better" in found[1.0].clips[0].candidate.lower()
    assert found[0.9].divergence.kl < 1.0
