"""Tiny Whispers and recordings, made on the spot."""

import pytest
import torch


def tiny_whisper(path, *, seed=0, languages=()):
    """A random Whisper of 2 + 2 layers that hears 2 s at once, saved with feature extractor and byte tokenizer; without
    languages, of English alone."""
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|startoftranscript|>"]
    special += [*(f"<|{code}|>" for code in languages), *(("<|translate|>", "<|transcribe|>") if languages else ())]
    special += ["<|startofprev|>", "<|notimestamps|>"]
    times = [f"<|{k * 0.02:.2f}|>" for k in range(101)]
    tokenizer = Tokenizer(models.BPE({byte: k for k, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in times])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    end = len(alphabet)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), special[0])
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer", **names}))
    WhisperFeatureExtractor(feature_size=16, chunk_length=2).save_pretrained(path)
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=end + len(special) + len(times), num_mel_bins=16, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=100, max_target_positions=24, pad_token_id=end, bos_token_id=end, eos_token_id=end,
        decoder_start_token_id=end + 1, init_std=0.2, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    ids = {token: end + k for k, token in enumerate(special)}
    marks = {"decoder_start_token_id": end + 1, "no_timestamps_token_id": ids["<|notimestamps|>"], "eos_token_id": end}
    options = {**marks, "pad_token_id": end, "is_multilingual": False, "return_timestamps": False, "max_length": 24}
    if languages:
        options |= {"is_multilingual": True, "lang_to_id": {f"<|{code}|>": ids[f"<|{code}|>"] for code in languages}}
        options["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("translate", "transcribe")}
    model.generation_config = GenerationConfig(**options)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def whisper(tmp_path_factory):
    return tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="session")
def polyglot(tmp_path_factory):
    """A Whisper of three languages."""
    return tiny_whisper(tmp_path_factory.mktemp("polyglot"), languages=("en", "fr", "de"))


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """Thirteen clips of noise of a pitch that wanders, half of them with a transcript; one is longer than a window."""
    import numpy as np
    import soundfile

    path = tmp_path_factory.mktemp("speech")
    generator = np.random.default_rng(0)
    for k in range(13):
        count = int(16_000 * (5.1 if k == 3 else generator.uniform(0.5, 1.9)))
        pitch = 200 + 150 * np.cumsum(generator.normal(size=count)) / np.sqrt(count)
        sound = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000) + 0.02 * generator.normal(size=count)
        soundfile.write(path / f"clip{k:02d}.wav", sound, 16_000)
        if k % 2:
            (path / f"clip{k:02d}.txt").write_text(f"clip {k} says so")
    return path
