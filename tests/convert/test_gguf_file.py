"""A damaged GGUF file is refused with a typed error, wherever the damage lies; it never hangs or crashes."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from cai_runtime.convert.gguf import gguf_to_hf
from cai_runtime.convert.gguf_file import GGUFFile
from cai_runtime.errors import ConversionError


def test_metadata_and_tensors_are_what_was_written(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_int32("a.i32", -7)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "größe")
    writer.add_array("a.floats", [0.5, 2.0])
    writer.add_array("a.texts", ["x", "", "ü"])
    writer.add_array("a.flags", [True, False])
    matrix = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    writer.add_tensor(
        "m", gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("v", matrix[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with GGUFFile(path) as file:
        assert {key: value for key, value in file.metadata.items() if key.startswith("a.")} == {
            "a.u32": 7,
            "a.i32": -7,
            "a.f64": 0.1,
            "a.bool": True,
            "a.text": "größe",
            "a.floats": [0.5, 2.0],
            "a.texts": ["x", "", "ü"],
            "a.flags": [True, False],
        }
        assert file.tensors["m"].shape == (5, 64)
        assert np.array_equal(file.array(file.tensors["v"]), matrix[0])
        whole = file.array(file.tensors["m"])
        assert np.abs(whole - matrix).max() < 0.02
        chunks = list(file.rows(file.tensors["m"], 2))
        assert [len(chunk) for chunk in chunks] == [2, 2, 1]
        assert np.array_equal(np.concatenate(chunks), whole)


def test_truncation_anywhere_is_found(tiny_llama, write_gguf, tmp_path):
    path = write_gguf(tiny_llama())
    data = path.read_bytes()
    for size in [0, 3, 10, 23, *range(24, len(data), len(data) // 60), len(data) - 33]:
        path.write_bytes(data[:size])
        with pytest.raises(ConversionError, match=r"tiny-F32\.gguf"):
            gguf_to_hf(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_random_damage_to_the_header_gives_a_typed_error_or_a_model(tiny_llama, write_gguf, tmp_path):
    path = write_gguf(tiny_llama())
    data = bytearray(path.read_bytes())
    with GGUFFile(path) as file:
        header = min(tensor.offset for tensor in file.tensors.values())
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, header, size=4):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            gguf_to_hf(path, tmp_path / f"out{i}")
        except ConversionError:
            refused += 1
    assert refused > 30, "this much damage must be noticed often (a changed letter of a token can't be)"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"GGML" + data[4:], "not a GGUF file"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 1"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: data[:16] + struct.pack("<Q", 1 << 60) + data[24:], "truncated or damaged"),
        (lambda data: data[:24] + struct.pack("<Q", 1 << 62) + data[32:], "truncated or damaged"),
    ],
    ids=["magic", "version", "endian", "count", "length"],
)
def test_what_is_wrong_is_said(tiny_llama, write_gguf, tmp_path, damage, message):
    path = write_gguf(tiny_llama())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConversionError, match=message):
        gguf_to_hf(path, tmp_path / "out")
