"""Whatever is wrong with a checkpoint, the error is typed, names file and tensor, and comes before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cai_runtime import errors
from cai_runtime.errors import CheckpointError
from cai_runtime.slim.reader import Checkpoint

EditFile = Callable[[Path, Callable[[dict[str, Any]], None]], None]
SHARD, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"


@pytest.fixture
def good(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(tmp_path / "good")


def check(
    path: Path,
    error: type[CheckpointError],
    *,
    file: str | None = None,
    tensor: str | None = None,
    match: str | None = None,
) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        Checkpoint.open(path)
    assert type(caught.value) is error, caught.value
    place = path if file is None else path / file
    assert caught.value.file == str(place) and caught.value.tensor == tensor, caught.value
    assert str(place) in str(caught.value) and (tensor is None or tensor in str(caught.value))


# What is missing.


def test_no_directory(tmp_path: Path) -> None:
    check(tmp_path / "none", errors.MissingFileError)


def test_no_config(good: Path) -> None:
    (good / CONFIG).unlink()
    check(good, errors.MissingFileError, file=CONFIG)


def test_no_weights_and_only_pickled_ones(good: Path) -> None:
    (good / SHARD).unlink()
    check(good, errors.MissingFileError, match="no safetensors")
    (good / "pytorch_model.bin").write_bytes(b"")
    check(good, errors.MissingFileError, match="pickled")


def test_a_shard_of_the_index_is_gone(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    path = write_checkpoint(tmp_path / "c", max_shard_bytes=200)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    check(path, errors.MissingFileError, file=shard.name)


@pytest.mark.parametrize(
    "tensor",
    [
        "layers.0.dense.weight_scale",
        "layers.0.low.core_1",
        "layers.0.four.core_0_scale",
        "layers.0.four.core_0_zero",
        "layers.1.inter.pivot",
        "layers.1.mpo.core_0_scale",
    ],
)
def test_a_tensor_of_a_module_is_missing(good: Path, edit_header: EditFile, tensor: str) -> None:
    edit_header(good / SHARD, lambda header: header.update({"other": header.pop(tensor)}))
    check(good, errors.TensorMissingError, tensor=tensor)


def test_the_index_names_a_tensor_that_no_shard_has(
    tmp_path: Path, write_checkpoint: Callable[..., Path], edit_json: EditFile
) -> None:
    path = write_checkpoint(tmp_path / "c", max_shard_bytes=200)
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    edit_json(path / INDEX, lambda index: index["weight_map"].update({"ghost": shards[0], "norm.weight": shards[0]}))
    with Checkpoint.open(path) as checkpoint:
        assert "ghost" not in checkpoint and "norm.weight" in checkpoint
        with pytest.raises(errors.TensorMissingError, match="ghost"):
            checkpoint.tensor("ghost")
    edit_json(path / INDEX, lambda index: index["weight_map"].update({"layers.1.inter.pivot": "gone.safetensors"}))
    check(path, errors.MissingFileError, file="gone.safetensors")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "weights.bin", 3])
def test_the_index_points_out_of_the_directory(
    tmp_path: Path, write_checkpoint: Callable[..., Path], edit_json: EditFile, name: object
) -> None:
    path = write_checkpoint(tmp_path / "c", max_shard_bytes=200)
    edit_json(path / INDEX, lambda index: index["weight_map"].update({"norm.weight": name}))
    check(path, errors.InvalidConfigError, file=INDEX, tensor="norm.weight")


def test_a_tensor_in_two_shards(good: Path) -> None:
    (good / SHARD).rename(good / "a.safetensors")
    shutil.copy(good / "a.safetensors", good / "b.safetensors")
    with pytest.raises(errors.InvalidConfigError, match=r"also in a\.safetensors"):
        Checkpoint.open(good)


# Config.


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_config_that_is_no_json_object(good: Path, text: str) -> None:
    (good / CONFIG).write_text(text)
    check(good, errors.InvalidConfigError, file=CONFIG)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "latin-1"])
def test_config_in_another_encoding(good: Path, encoding: str) -> None:
    config = json.loads((good / CONFIG).read_text()) | {"_name_or_path": "modèle"}
    (good / CONFIG).write_bytes(json.dumps(config, ensure_ascii=False).encode(encoding))
    with Checkpoint.open(good) as checkpoint:
        assert checkpoint.config == config and checkpoint.is_slim


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"])
def test_a_text_file_in_another_encoding(good: Path, name: str, encoding: str) -> None:
    (good / name).write_bytes('{"a": "é"}'.encode(encoding))
    check(good, errors.InvalidConfigError, file=name, match="save it as UTF-8 without a byte order mark")


@pytest.mark.parametrize("name", [SHARD, CONFIG, "tokenizer.json", "tokenizer.model", "generation_config.json"])
def test_a_pointer_in_place_of_the_file(good: Path, name: str) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    (good / name).write_text(pointer)
    check(good, errors.CorruptFileError, file=name, match="git lfs pull")


def test_files_that_are_not_read_do_no_harm(good: Path) -> None:
    (good / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    (good / "notes.txt").write_bytes("é".encode("latin-1"))
    Checkpoint.open(good).close()


def test_a_relative_path_outlives_a_change_of_directory(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(good.parent)
    with Checkpoint.open(good.name) as checkpoint:
        monkeypatch.chdir("/")
        assert checkpoint.path == good and float(checkpoint.tensor("norm.weight").sum()) == 6


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("kind", "tucker", errors.UnknownKindError),
        ("store", ["int8", "nf4"], errors.UnknownStoreError),
        ("rank", 99, errors.InvalidConfigError),
        ("blocks", 2, errors.InvalidConfigError),
    ],
)
def test_module_entry(good: Path, edit_json: EditFile, key: str, value: object, error: type[CheckpointError]) -> None:
    name = "layers.0.low"
    edit_json(good / CONFIG, lambda config: config["quantization_config"]["modules"][name].update({key: value}))
    check(good, error, file=CONFIG, tensor=name)


def test_unknown_version(good: Path, edit_json: EditFile) -> None:
    edit_json(good / CONFIG, lambda config: config["quantization_config"].update({"format_version": 2}))
    check(good, errors.UnknownVersionError, file=CONFIG, match="version 2")


def test_quantized_by_something_else(good: Path, edit_json: EditFile) -> None:
    edit_json(good / CONFIG, lambda config: config["quantization_config"].update({"quant_method": "gptq"}))
    check(good, errors.InvalidConfigError, file=CONFIG, match="gptq")


# Shapes and dtypes.


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("layers.0.dense.weight", [5, 7]),
        ("layers.0.low.core_1", [4, 9]),
        ("layers.0.low.core_0_scale", [1, 4]),
        ("layers.0.low.bias", [9, 1]),
        ("layers.1.inter.pivot", [2, 4]),
        ("layers.1.mpo.core_1", [4, 1, 3, 3]),
        ("layers.0.four.core_0", [18, 5]),
        ("layers.0.four.core_0_scale", [10, 1]),
        ("layers.0.four.core_0_zero", [2, 5]),
        ("layers.0.four.core_1_scale", [8]),
    ],
)
def test_wrong_shape(good: Path, edit_header: EditFile, tensor: str, shape: list[int]) -> None:
    edit_header(good / SHARD, lambda header: header[tensor].update({"shape": shape}))
    check(good, errors.TensorShapeError, file=SHARD, tensor=tensor)


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        ("layers.0.dense.weight", "U8"),
        ("layers.0.low.core_1", "F16"),
        ("layers.0.low.core_0_scale", "I32"),
        ("layers.0.low.bias", "I32"),
        ("layers.1.inter.pivot", "U32"),
        ("layers.0.four.core_0", "I8"),
        ("layers.0.four.core_0_scale", "F16"),
        ("layers.0.four.core_0_zero", "I8"),
        ("norm.weight", "F31"),
    ],
)
def test_wrong_dtype(good: Path, edit_header: EditFile, tensor: str, dtype: str) -> None:
    edit_header(good / SHARD, lambda header: header[tensor].update({"dtype": dtype}))
    check(good, errors.TensorDtypeError, file=SHARD, tensor=tensor)


@pytest.mark.parametrize(
    "extra", ["layers.0.low.weight", "layers.1.inter.core_2", "layers.1.mpo.pivot", "layers.0.four.core_1_zero"]
)
def test_a_tensor_that_no_entry_explains(good: Path, edit_header: EditFile, extra: str) -> None:
    edit_header(good / SHARD, lambda header: header.update({extra: header.pop("norm.weight")}))
    check(good, errors.InvalidConfigError, file=SHARD, tensor=extra)


def test_a_packed_weight_that_is_not_listed(good: Path, edit_json: EditFile) -> None:
    edit_json(good / CONFIG, lambda config: config["quantization_config"]["modules"].pop("layers.0.dense"))
    with Checkpoint.open(good) as checkpoint:
        with pytest.raises(errors.TensorDtypeError):
            checkpoint.module("layers.0.dense")
        with pytest.raises(errors.TensorShapeError):
            checkpoint.module("norm")
        with pytest.raises(errors.TensorMissingError) as caught:
            checkpoint.module("lm_head")
        assert caught.value.tensor == "lm_head.weight"


# Shards.


@pytest.mark.parametrize("size", [0, 5, 8, 300])
def test_truncated_in_the_header(good: Path, size: int) -> None:
    raw = (good / SHARD).read_bytes()
    (good / SHARD).write_bytes(raw[:size])
    check(good, errors.TruncatedFileError, file=SHARD)


def test_truncated_in_the_data_names_the_tensor(good: Path) -> None:
    with Checkpoint.open(good) as checkpoint:
        infos = sorted(checkpoint.tensors().values(), key=lambda info: info.start)
    raw = (good / SHARD).read_bytes()
    (good / SHARD).write_bytes(raw[:-1])
    check(good, errors.TruncatedFileError, file=SHARD, tensor=infos[-1].name)
    (good / SHARD).write_bytes(raw[: infos[2].start + 1])
    check(good, errors.TruncatedFileError, file=SHARD, tensor=infos[2].name)


def test_bytes_behind_the_last_tensor(good: Path) -> None:
    with (good / SHARD).open("ab") as f:
        f.write(b"\0")
    check(good, errors.CorruptFileError, file=SHARD)


def test_overlapping_and_missing_ranges(good: Path, edit_header: EditFile) -> None:
    original = (good / SHARD).read_bytes()

    def shift(by: int) -> Callable[[dict[str, Any]], None]:
        def change(header: dict[str, Any]) -> None:
            start, end = header["norm.weight"]["data_offsets"]
            header["norm.weight"]["data_offsets"] = [start + by, end + by]

        return change

    for by, match in ((-4, "overlaps"), (4, "hole")):
        (good / SHARD).write_bytes(original)
        edit_header(good / SHARD, shift(by))
        with pytest.raises(errors.CorruptFileError, match=match):
            Checkpoint.open(good)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {"dtype": "F32", "shape": [6]},
        {"dtype": "F32", "shape": [6], "data_offsets": [0, 24], "strides": [1]},
        {"dtype": "F32", "shape": [-6], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [6.0], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [6], "data_offsets": [0]},
        {"dtype": "F32", "shape": [6], "data_offsets": [24, 0]},
        {"dtype": "F32", "shape": [7], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**4000, 10**4000], "data_offsets": [0, 24]},
    ],
)
def test_malformed_header_entries(good: Path, edit_header: EditFile, entry: object) -> None:
    edit_header(good / SHARD, lambda header: header.update({"norm.weight": entry}))
    check(good, errors.CorruptFileError, file=SHARD, tensor="norm.weight")


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 50_000, b'{"\\ud800": {}}'])
def test_headers_that_are_none(good: Path, header: bytes) -> None:
    (good / SHARD).write_bytes(len(header).to_bytes(8, "little") + header)
    check(good, errors.CorruptFileError, file=SHARD)


def test_a_header_length_that_is_absurd(good: Path) -> None:
    (good / SHARD).write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    check(good, errors.CorruptFileError, file=SHARD)


# Values.


def overwrite(path: Path, tensor: str, at: int, value: bytes) -> None:
    with Checkpoint.open(path) as checkpoint:
        info = checkpoint.tensors()[tensor]
    with info.file.open("r+b") as f:
        f.seek(info.start + at)
        f.write(value)


@pytest.mark.parametrize("first", [7, -1, 8])  # a repeated value, and two out of range
def test_a_pivot_that_is_no_permutation(good: Path, first: int) -> None:
    name = "layers.1.inter.pivot"
    with Checkpoint.open(good) as checkpoint:
        pivot = checkpoint.tensor(name).clone()
    place = int((pivot != 7).nonzero()[0])
    overwrite(good, name, 4 * place, first.to_bytes(4, "little", signed=True))
    check(good, errors.InvalidPivotError, file=SHARD, tensor=name)


NAN_F32, INF_F32, NAN_BF16 = b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xc0\x7f"


@pytest.mark.parametrize(
    ("module", "tensor", "value"),
    [
        ("layers.0.dense", "layers.0.dense.weight_scale", NAN_F32),
        ("layers.0.low", "layers.0.low.core_1", NAN_BF16),
        ("layers.0.low", "layers.0.low.bias", INF_F32),
        ("layers.1.mpo", "layers.1.mpo.core_1", NAN_F32),
        ("layers.0.four", "layers.0.four.core_0_scale", NAN_BF16),
    ],
)
def test_nan_and_infinity(good: Path, module: str, tensor: str, value: bytes) -> None:
    overwrite(good, tensor, 4, value)
    with Checkpoint.open(good) as checkpoint:
        for read in (lambda: checkpoint.module(module), lambda: checkpoint.verify(progress=False)):
            with pytest.raises(errors.NonFiniteTensorError) as caught:
                read()
            assert caught.value.file == str(good / SHARD) and caught.value.tensor == tensor
        checkpoint.module(module, check_finite=False)


@pytest.mark.parametrize(
    ("tensor", "at", "value", "match"),
    [
        ("layers.1.inter.core_0_scale", 0, b"\0\0\0\0", "positive"),
        ("layers.1.inter.core_0_scale", 0, b"\0\0\x80\xbf", "positive"),
        ("layers.0.four.core_0_scale", 4, b"\0\0", "positive"),
        ("layers.0.four.core_1_scale", 2, b"\x80\xbf", "positive"),
        ("layers.0.four.core_0_zero", 9, b"\x10", "zero point"),
        ("layers.0.four.core_0", 17, b"\x10", "half"),  # 35 columns: the 18th byte of a row has one code
        ("layers.0.four.core_1", 5, b"\x10", "half"),
    ],
)
def test_values_that_no_writer_stores(good: Path, tensor: str, at: int, value: bytes, match: str) -> None:
    overwrite(good, tensor, at, value)
    name = tensor.rpartition(".")[0]
    with Checkpoint.open(good) as checkpoint:
        for read in (lambda: checkpoint.module(name), lambda: checkpoint.verify(progress=False)):
            with pytest.raises(errors.CorruptFileError, match=match) as caught:
                read()
            assert caught.value.tensor == tensor and caught.value.file == str(good / SHARD)
        checkpoint.module(name, check_finite=False)


def test_a_file_that_shrinks_while_open(good: Path) -> None:
    with Checkpoint.open(good) as checkpoint:
        raw = (good / SHARD).read_bytes()
        (good / SHARD).write_bytes(raw[:-200])
        last = max(checkpoint.tensors().values(), key=lambda info: info.start)
        with pytest.raises(errors.TruncatedFileError) as caught:
            checkpoint.tensor(last.name)
        assert caught.value.tensor == last.name


def test_a_closed_checkpoint(good: Path) -> None:
    checkpoint = Checkpoint.open(good)
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("norm.weight")
