"""Tuned tiles: families, files, and what may stand in them. And the launcher that goes past Triton's binder."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing here is interpreted", allow_module_level=True)

from cai_runtime.errors import KernelError
from cai_runtime.kernels.triton import launch, tune, tuning
from cai_runtime.kernels.triton.tiles import Products, Tile, default_tile

GPU = torch.device("cuda", 0)
INT4 = Products(True, torch.bfloat16, "int4", 64, 2000, 4096, GPU)
GOOD = {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 6}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAI_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    tuning.tuned_tiles.cache_clear()
    yield tmp_path
    tuning.tuned_tiles.cache_clear()


def test_families():
    assert tuning.family(INT4) == "bfloat16/int4-64/decode/n2048-k4096"
    prefill = Products(False, torch.int8, "int8", 0, 10**6, 1, GPU)
    assert tuning.family(prefill) == "int8/int8/prefill/n32768-k256"


def test_a_file_goes_before_the_default_and_the_user_s_before_the_package_s(home: Path):
    assert tuning.tile_for(INT4) == default_tile(INT4)
    name = "NVIDIA H100 80GB HBM3"
    shipped, own = Tile(16, 64, 4, 6), Tile(16, 32, 1, 3, 255)
    other = replace(INT4, columns=4000)
    tuning.write_tiles(
        home / "shipped" / "nvidia-h100-80gb-hbm3.json", name, dict.fromkeys(map(tuning.family, (INT4, other)), shipped)
    )
    tuning.write_tiles(home / "tuning" / tuning.file_name(name), name, {tuning.family(INT4): own})
    tuning.tuned_tiles.cache_clear()
    assert tuning.tile_for(INT4) == own and tuning.tile_for(other) == shipped
    assert tuning.tile_for(replace(INT4, group=128)) == default_tile(INT4)
    assert tuning.tile_for(replace(INT4, device=torch.device("cpu"))) == default_tile(INT4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read"),
        ("[]", "no object named tiles"),
        (json.dumps({"tiles": {"bfloat16/x": {**GOOD, "block_k": 64}}}), "must have block_m"),
        (json.dumps({"tiles": {"bfloat16/x": {"block_m": 16}}}), "must have block_m"),
        (json.dumps({"tiles": {"bfloat16/x": {**GOOD, "num_warps": 3}}}), "num_warps of bfloat16/x can't be 3"),
        (json.dumps({"tiles": {"bfloat16/x": {**GOOD, "num_warps": True}}}), "num_warps"),
        (json.dumps({"tiles": {"bfloat16/x": {**GOOD, "num_stages": "4"}}}), "num_stages"),
        (json.dumps({"tiles": {"bfloat16/x": {**GOOD, "block_m": 64}}}), "above 32 sums round otherwise"),
    ],
)
def test_a_malformed_file_is_named(home: Path, text: str, message: str):
    path = home / "tuning" / "nvidia-h100-80gb-hbm3.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(KernelError, match=message) as caught:
        tuning.tile_for(INT4)
    assert str(path) in str(caught.value)


def test_int8_sums_may_have_taller_tiles(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"tiles": {"int8/int8/prefill/n4096-k4096": {**GOOD, "block_m": 128}}}))
    assert tuning.read_tiles(path) == {"int8/int8/prefill/n4096-k4096": Tile(128, 64, 4, 6)}


def test_every_candidate_may_stand_in_a_file(tmp_path: Path):
    for products in (INT4, replace(INT4, decode=False), Products(False, torch.int8, "int8", 0, 9, 9, GPU)):
        tiles = list(tune.candidates(products))
        assert tiles[0] == default_tile(products) and len(set(tiles)) > 20
        for tile in tiles:
            path = tmp_path / "x.json"
            path.unlink(missing_ok=True)
            tuning.write_tiles(path, "x", {tuning.family(products): tile})
            assert tuning.read_tiles(path) == {tuning.family(products): tile}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tuning_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(KernelError, match="no GPU is seen"):
        tune.tune()
    assert tune.main([]) == 1
    assert "no GPU is seen" in capsys.readouterr().err


def test_stores_and_shapes_are_read(capsys: pytest.CaptureFixture[str]):
    core = tune.random_core("int4/64", 5, 130, torch.device("cpu"))
    assert core.shape == (5, 130) and core.scale is not None and core.scale.shape == (5, 3)
    with pytest.raises(KernelError, match="unknown store 'int4/7'"):
        tune.random_core("int4/7", 5, 130, torch.device("cpu"))
    with pytest.raises(SystemExit):
        tune.main(["--shapes", "12"])
    assert "not a comma list" in capsys.readouterr().err


def test_launcher_compiles_once_for_a_key():
    calls: list[tuple] = []

    class Kernel:
        """Takes what Triton's JIT function takes; what it returns is launched as a compiled kernel is."""

        def __init__(self, name: str, compiled: object):
            self.name, self.compiled = name, compiled

        def __getitem__(self, grid: tuple[int, int, int]):
            def launched(*arguments, **options):
                calls.append((self.name, grid, arguments, options))
                return self.compiled

            return launched

    launcher = launch.Launcher(Kernel("jit", Kernel("compiled", None)))
    weight = torch.zeros(3)
    kept = ((weight, 7), (weight.data_ptr(), 7))
    for key in ("a", "a", "b"):
        launcher(key, (1, 2, 3), (5,), kept, (9,), {"num_warps": 2})
    assert [c[0] for c in calls] == ["jit", "compiled", "jit"]
    assert calls[0][2][1] is weight and calls[0][3] == {"num_warps": 2}
    assert calls[1][1:] == ((1, 2, 3), (5, weight.data_ptr(), 7, 9), {})


def test_classes_of_arguments():
    assert len({launch.number_class(n) for n in (1, 2, 16, 2**33, 2**33 + 1)}) == 5
    assert launch.number_class(32) == launch.number_class(0)
    x = torch.zeros(32, dtype=torch.bfloat16)
    assert len({launch.pointer_class(t) for t in (None, x, x[1:])}) == 3
