"""Sources that are not what they claim to be are named before any work, and nothing is left."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cai_runtime.compressor import compress, dry_run
from cai_runtime.errors import (
    CheckpointError,
    CompressionError,
    InvalidConfigError,
    TensorDtypeError,
    TensorMissingError,
    TensorShapeError,
)
from cai_runtime.stock.load import dense_reference

UP, NORM, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture
def source(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "source")


def attempt(source, text_file, tmp_path, error, match):
    """It is refused, global random state stays as it was, and nothing but the source is left."""
    before = torch.random.get_rng_state()
    with pytest.raises(error, match=match) as caught:
        compress(source, tmp_path / "slim", calibration=text_file, samples=4, sequence_length=32, rank_multiple=1,
                 refine_epochs=0, heal_tokens=0, evaluate=False, progress=False)  # fmt: skip
    assert torch.equal(before, torch.random.get_rng_state())
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
    return caught.value


def change(source, **tensors):
    """Replace tensors, or with None remove them."""
    file = source / "model.safetensors"
    found = load_file(file) | tensors
    save_file({name: t for name, t in found.items() if t is not None}, file, metadata={"format": "pt"})


def configure(source, **entries):
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("name", [UP, NORM, EMBEDDING])
def test_a_missing_tensor(source, text_file, tmp_path, name):
    change(source, **{name: None})
    assert attempt(source, text_file, tmp_path, TensorMissingError, "does not have this tensor").tensor == name
    with pytest.raises(TensorMissingError, match="of the tensors"):
        dense_reference(source)


def test_a_head_that_is_not_tied_and_not_there(source, text_file, tmp_path):
    configure(source, tie_word_embeddings=False)
    assert attempt(source, text_file, tmp_path, TensorMissingError, "config.json").tensor == "lm_head.weight"


def test_more_blocks_than_there_are(source, text_file, tmp_path):
    configure(source, num_hidden_layers=3)
    error = attempt(source, text_file, tmp_path, TensorMissingError, "nor 8 others")
    assert error.tensor.startswith("model.layers.2.")


@pytest.mark.parametrize(("name", "rows"), [(UP, 50), (NORM, 20)])
def test_a_tensor_of_another_shape(source, text_file, tmp_path, name, rows):
    whole = load_file(source / "model.safetensors")[name]
    change(source, **{name: whole[:rows].contiguous()})
    error = attempt(source, text_file, tmp_path, TensorShapeError, rf"is \[{rows}.*config.json says \[{len(whole)}")
    assert error.tensor == name and error.file.endswith("model.safetensors")


@pytest.mark.parametrize("entry", [{"vocab_size": 50}, {"vocab_size": 70}, {"intermediate_size": 64}])
def test_a_config_of_another_model(source, text_file, tmp_path, entry):
    configure(source, **entry)
    attempt(source, text_file, tmp_path, TensorShapeError, "config.json says")


@pytest.mark.parametrize(("name", "dtype"), [(EMBEDDING, torch.int8), (UP, torch.int32), (UP, torch.float8_e4m3fn)])
def test_a_dtype_that_is_no_weight(source, text_file, tmp_path, name, dtype):
    change(source, **{name: load_file(source / "model.safetensors")[name].to(dtype)})
    assert attempt(source, text_file, tmp_path, TensorDtypeError, "must be F32").tensor == name


@pytest.mark.parametrize(
    "entry",
    [
        {"hidden_size": "x"},
        {"hidden_size": 33},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"dtype": "nope"},
        {"hidden_act": "nope"},
        {"model_type": "nope"},
    ],
)
def test_a_config_that_transformers_stumbles_over(source, text_file, tmp_path, entry):
    configure(source, **entry)
    attempt(source, text_file, tmp_path, CompressionError, r"can't build the model of .*source: .")
    with pytest.raises(CompressionError, match="can't load"):
        dense_reference(source)
    with pytest.raises(CompressionError, match="can't build"):
        dry_run(source, tmp_path / "slim", refine_epochs=0, heal_tokens=0)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe\x00", b"3"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer(source, text_file, tmp_path, name, content):
    (source / name).write_bytes(content)
    attempt(source, text_file, tmp_path, (CompressionError, CheckpointError), "tokenizer")


def test_a_damaged_file_that_goes_along(source, text_file, tmp_path):
    """It would be found out when the result is judged, after all the work."""
    (source / "generation_config.json").write_text("{")
    attempt(source, text_file, tmp_path, InvalidConfigError, "generation_config.json")
