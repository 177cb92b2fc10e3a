"""Tokenizers load with the pipeline of their tokenizer.json, whatever class their config declares."""

import json

import pytest

from cai_runtime.engine.tokenizer import load_tokenizer, tokenizer_class
from cai_runtime.errors import InvalidConfigError, MissingFileError

TEXT = "Hello  world 123\n x"


@pytest.fixture
def directory(tmp_path):
    """Writes a checkpoint's tokenizer files: byte-level, or sentencepiece-like."""

    def write(declared, byte_level=True):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
        if byte_level:
            digits = pre_tokenizers.Digits(individual_digits=True)
            inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
            inner.decoder = decoders.Sequence([decoders.ByteLevel()])
        else:
            inner.pre_tokenizer = pre_tokenizers.Metaspace()
            inner.decoder = decoders.Metaspace()
        inner.add_special_tokens(["<unk>", "<s>", "</s>"])
        inner.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": declared}))
        return tmp_path

    return write


@pytest.mark.parametrize("suffix", ["", "Fast"])
@pytest.mark.parametrize("declared", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizer"])
def test_byte_level_file_keeps_its_pipeline(directory, declared, suffix):
    path = directory(declared + suffix)
    assert tokenizer_class(path).__name__ != "AutoTokenizer"  # which in some versions drops every space
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("declared", ["LlamaTokenizerFast", "WhisperTokenizer", None])
def test_other_files_are_left_to_transformers(directory, declared):
    assert tokenizer_class(directory(declared, byte_level=False)).__name__ == "AutoTokenizer"


@pytest.mark.parametrize("damage", ["{", "[]", "\ufeff{}", "null"])
def test_damaged_files(directory, damage):
    path = directory("LlamaTokenizerFast")
    (path / "tokenizer_config.json").write_text(damage)
    assert tokenizer_class(path).__name__ == "AutoTokenizer"
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidConfigError, match="tokenizer can't be read"):
        load_tokenizer(path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(MissingFileError, match="tokenizer"):
        load_tokenizer(tmp_path)
