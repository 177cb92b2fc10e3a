"""Our Whisper against transformers', on tiny random models that cover its options: windows, chunks, batches, decode."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_whisper import ROWS, VOCABULARY, Seated, expected_logits, run, tiny_whisper, windows

from cai_runtime.engine.model_runner import ModelRunner
from cai_runtime.engine.open import load_runner
from cai_runtime.engine.step import AttentionRows
from cai_runtime.errors import InvalidConfigError, KernelError, TensorShapeError, UnsupportedModelError
from cai_runtime.kernels.prepare import prepare
from cai_runtime.models.whisper import Whisper

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fewer decoder layers": {"encoder_layers": 3, "decoder_layers": 1},
    "other heads": {"encoder_attention_heads": 2, "decoder_attention_heads": 8},
    "more mels": {"num_mel_bins": 20},
    "an odd number of mels": {"num_mel_bins": 5},
    "untied": {"tie_word_embeddings": False},
    "wide": {"d_model": 96, "encoder_attention_heads": 3, "decoder_attention_heads": 6},
}
Opener = Callable[..., ModelRunner]
IDS = torch.randint(0, VOCABULARY, (30,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def open_runner() -> Iterator[Callable[..., ModelRunner]]:
    """Opens runners that are closed after the test."""
    runners = []

    def opened(path: Path, **options: Any) -> ModelRunner:
        runners.append(load_runner(path, kv_cache="32MiB", progress=False, **options)[0])
        return runners[-1]

    yield opened
    for runner in runners:
        runner.close()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_logits_match_transformers(tmp_path: Path, open_runner: Opener, name: str, backend: str):
    model = tiny_whisper(tmp_path, **OPTIONS[name])
    runner = open_runner(tmp_path, backend=backend)
    assert runner.max_context == 64 and runner.able == {"encoder", "cross_attention"}
    (features,) = windows(1, OPTIONS[name].get("num_mel_bins", 12))
    expected = expected_logits(model, features, IDS)
    whole = Seated(runner, 0, features)
    ours = run(runner, whole.step(IDS, len(IDS)))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    chunked = Seated(runner, 1, features)
    rows = [run(runner, chunked.step(IDS[:7], 7)), run(runner, chunked.step(IDS[7:20], 13))]
    rows += [run(runner, chunked.step([token], 1)) for token in IDS[20:]]
    torch.testing.assert_close(torch.cat(rows), ours, rtol=0, atol=0 if backend == "cpu" else 1e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_row_does_not_see_its_neighbours(tmp_path: Path, open_runner: Opener, backend: str):
    tiny_whisper(tmp_path)
    runner = open_runner(tmp_path, backend=backend)
    many = windows(3)
    alone = [run(runner, Seated(runner, i, f).step(IDS[: 9 + i], 1)) for i, f in enumerate(many)]
    batch = [Seated(runner, i, f) for i, f in enumerate(many)]
    together = run(runner, *(seat.step(IDS[: 9 + i], 1) for i, seat in enumerate(batch)))
    tolerance = 0 if backend == "cpu" else 1e-5
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=tolerance)
    # Texts of one window, whose keys and values are read once for all of them.
    forks = [Seated(runner, 3 + i, many[1], pages_of=1) for i in range(3)]
    shared = run(runner, *(seat.step([*IDS[:9], i], 1) for i, seat in enumerate(forks)))
    for i, row in enumerate(shared):
        one = run(runner, Seated(runner, 7, many[1]).step([*IDS[:9], i], 1))
        torch.testing.assert_close(row[None], one, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_cross_attention_weights_match_transformers(tmp_path: Path, open_runner: Opener, backend: str):
    model = tiny_whisper(tmp_path)
    model.set_attn_implementation("eager")
    runner = open_runner(tmp_path, backend=backend)
    (features,) = windows(1)
    with torch.inference_mode():
        seen = model(
            input_features=torch.from_numpy(features.T.copy())[None],
            decoder_input_ids=torch.tensor([IDS]),
            output_attentions=True,
        ).cross_attentions
    heads = ((1, 3), (0, 0), (1, 0))
    step = Seated(runner, 2, features).step(IDS, 0)
    step.feeds[0].attention = AttentionRows(heads, 12)
    run(runner, step)
    found = step.feeds[0].attention.weights
    expected = np.stack([seen[layer][0, head, -12:].numpy() for layer, head in heads])
    assert found.shape == (3, 12, ROWS) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 6e-2), ("fp16", 6e-3)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_half_precision(tmp_path: Path, open_runner: Opener, dtype: str, tolerance: float, backend: str):
    model = tiny_whisper(tmp_path)
    runner = open_runner(tmp_path, dtype=dtype, backend=backend)
    (features,) = windows(1)
    expected = expected_logits(model, features, IDS)[-1]
    ours = run(runner, Seated(runner, 0, features).step(IDS, 1))[0]
    assert float((ours - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_cross_attention_is_cached_as_the_weights_are_stored(tmp_path: Path, open_runner: Opener, stored: str):
    """Keys and values of 16 bits where the weights have 16; of 32 where the caller asks for it."""
    model = tiny_whisper(tmp_path)
    model.to(getattr(torch, stored)).save_pretrained(tmp_path)
    (features,) = windows(1)
    sizes, logits = {}, {}
    asked: dict[str, dict[str, str]] = {"auto": {}, "kv": {"kv_dtype": "fp32"}, "fp32": {"dtype": "fp32"}}
    asked |= {"int8": {"kv_dtype": "int8"}, "both": {"kv_dtype": "int8", "dtype": "fp32"}}
    for name, options in asked.items():
        runner = open_runner(tmp_path, backend="cpu", **options)
        sizes[name] = tuple(group.page_bytes for group in runner.groups)
        logits[name] = run(runner, Seated(runner, 0, features).step(IDS, len(IDS)))
    assert sizes["kv"] == sizes["fp32"] == (sizes["auto"][0], 2 * sizes["auto"][1])
    off = float((logits["auto"] - logits["kv"]).norm() / logits["kv"].norm())
    assert 0 < off < 0.02
    for name, other in (("int8", "auto"), ("both", "kv")):  # the text's alone are held in int8
        assert sizes[name][1] == sizes[other][1] and 3 * sizes[name][0] < sizes[other][0]
        assert 0 < float((logits[name] - logits[other]).norm() / logits[other].norm()) < 0.02


@pytest.mark.parametrize(
    ("isa", "option", "encoder", "decoder"),
    [
        ("generic", "auto", True, False), ("avx512", "auto", True, True), ("generic", "int8", True, True),
        ("avx512", "fp32", False, False),
    ],
)  # fmt: skip
def test_activations_of_encoder_and_decoder(
    tmp_path: Path,
    open_runner: Opener,
    monkeypatch: pytest.MonkeyPatch,
    isa: str,
    option: str,
    encoder: bool,
    decoder: bool,
):
    tiny_whisper(tmp_path)
    rounded = []

    def noted(*args: Any, int8_activations: bool, **options: Any) -> Any:
        rounded.append(int8_activations)
        return prepare(*args, int8_activations=int8_activations, **options)

    monkeypatch.setattr("cai_runtime.layers.linear.prepare", noted)
    monkeypatch.setattr("cai_runtime.kernels.cpu_library.instruction_set", lambda: isa)
    open_runner(tmp_path, backend="cpu", activations=option)
    assert rounded == [encoder] * 8 + [decoder] * 14  # qkv, output, up, down of 2 layers; and 3 more of the decoder's


def test_a_closed_runner_holds_no_weights(tmp_path: Path):
    tiny_whisper(tmp_path)
    runner, _ = load_runner(tmp_path, kv_cache="32MiB", progress=False, backend="cpu")
    (features,) = windows(1)
    gc.disable()
    try:
        run(runner, Seated(runner, 0, features).step(IDS, 1))
        model = runner._model
        assert isinstance(model, Whisper)
        weights = [weakref.ref(model.encoder[0].attention.qkv), weakref.ref(model.decoder[0].crossed.cache)]
        del model
        runner.close()
        assert [found() for found in weights] == [None, None]
    finally:
        gc.enable()


def test_features_of_another_shape_are_refused(tmp_path: Path, open_runner: Opener):
    tiny_whisper(tmp_path)
    runner = open_runner(tmp_path)
    for wrong in (np.zeros((2 * ROWS, 13), np.float32), np.zeros((2 * ROWS - 1, 12), np.float32)):
        with pytest.raises(KernelError, match=r"features have shape .*\[144, 12\]"):
            run(runner, Seated(runner, 0, wrong).step(IDS, 1))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"activation_function": "relu"}, UnsupportedModelError, "relu"),
        ({"d_model": 62}, InvalidConfigError, "heads"),
        ({"max_source_positions": 70}, TensorShapeError, "embed_positions"),
        ({"num_mel_bins": 13}, TensorShapeError, "conv1"),
        ({"decoder_layers": 0}, InvalidConfigError, "decoder_layers"),
    ],
)
def test_an_impossible_config_is_refused(
    tmp_path: Path, open_runner: Opener, change: dict[str, Any], error: type[Exception], said: str
):
    from tiny_llama import change_config

    tiny_whisper(tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(error, match=said):
        open_runner(tmp_path)
