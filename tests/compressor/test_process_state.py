"""A compression in a process that has other things to do: threads, torch's global settings, files."""

import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from cai_runtime.compressor import compress
from cai_runtime.errors import CompressionError
from cai_runtime.stock.torch_state import parameters_on_meta

SETTINGS = {"samples": 4, "sequence_length": 32, "rank_multiple": 1, "refine_epochs": 1, "heal_tokens": 640,
            "evaluate": False, "progress": False}  # fmt: skip


def weights(source, dst, text_file, **options):
    compress(source, dst, calibration=text_file, **{**SETTINGS, **options})
    return (dst / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tiny, text_file, tmp_path_factory):
    return weights(tiny, tmp_path_factory.mktemp("alone") / "slim", text_file)


def state():
    names = ("get_num_threads", "get_default_dtype", "is_grad_enabled", "is_inference_mode_enabled", "get_default_device",
             "are_deterministic_algorithms_enabled", "get_float32_matmul_precision", "is_autocast_enabled")  # fmt: skip
    return {name: getattr(torch, name)() for name in names}, torch.random.get_rng_state().tolist()


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "setting",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.bfloat16),
    ],
    ids=["no_grad", "inference_mode", "meta", "autocast", "float64", "bfloat16"],
)
def test_torch_s_settings_change_nothing_and_are_not_changed(tiny, text_file, tmp_path, alone, setting):
    with setting():
        before = state()
        assert weights(tiny, tmp_path / "slim", text_file) == alone
        with pytest.raises(CompressionError):
            weights(tiny, tmp_path / "none", tmp_path / "none.txt")
        assert state() == before


def test_two_threads(tiny, make_tiny, text_file, tmp_path, alone):
    other = make_tiny(seed=1, hidden_size=48, num_hidden_layers=3)
    wanted = [alone, weights(other, tmp_path / "other", text_file)]
    for attempt in range(2):
        with ThreadPoolExecutor() as pool:
            runs = [
                pool.submit(weights, source, tmp_path / f"slim-{attempt}-{k}", text_file)
                for k, source in enumerate((tiny, other))
            ]
            assert [run.result() for run in runs] == wanted


def test_what_other_threads_make_is_not_on_meta():
    with ThreadPoolExecutor(1) as pool, parameters_on_meta():
        assert nn.Linear(2, 2).weight.is_meta
        assert not pool.submit(nn.Linear, 2, 2).result().weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell")
def test_no_file_stays_open(tiny, text_file, tmp_path):
    def held(directory):
        opened = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        mapped = Path("/proc/self/maps").read_text().splitlines()
        return [text for text in [*opened, *mapped] if str(directory) in text]

    gc.collect()  # earlier tests read the same files, and may have left them in cycles
    weights(tiny, tmp_path / "slim", text_file)
    with pytest.raises(CompressionError):
        weights(tiny, tmp_path / "none", tmp_path / "none.txt")
    assert held(tiny) == [] and held(tmp_path) == []
