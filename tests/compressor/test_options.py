"""Options out of range or of another type are named before any work, and nothing is left."""

import numpy as np
import pytest
import torch

from cai_runtime.compressor import compress, dry_run
from cai_runtime.compressor.pipeline import options_of
from cai_runtime.errors import CheckpointWriteError, CompressionError

GOOD = {"samples": 4, "sequence_length": 32, "rank_multiple": 1, "refine_epochs": 0, "heal_tokens": 0, "evaluate": False,
        "progress": False}  # fmt: skip
FLAGS = ("curvature", "shift", "elastic", "overwrite", "restart", "evaluate")
COUNTS = ("refine_epochs", "heal_tokens", "samples", "rank_multiple")
BAD = [
    *(("keep", value) for value in ("0.5", True, [1], float("nan"), 0, 1.1, 1e-9)),
    *(("target_bytes", value) for value in (True, [], 0.45, "0%", "101%", "9" * 400, "80 QB", 1, "10%")),
    *(("store", value) for value in (3, ["int8"], "int3")),
    *(("embedding_store", value) for value in (3, ["int8"])),
    *(("kind", value) for value in (3, "tt")),
    *(("allocation", value) for value in (3, None)),
    *((name, value) for name in FLAGS for value in ("no", 1)),
    *((name, value) for name in COUNTS for value in (1.5, "2", True, -1)),
    *(("sequence_length", value) for value in (32.0, 1, None, 100_000)),
    *(("floor", value) for value in ("x", None, float("nan"), -1)),
    *(("plan", value) for value in (3, [], {})),
    *(("smallest_keep", value) for value in (0.5, "x")),
    *(("device", value) for value in (None, 3, torch.device("cpu"), "meta", "mps", "cpu:7", "nonsense", "")),
    *(("dtype", value) for value in (torch.float32, 3, "fp64")),
    *(("seed", value) for value in (1.5, "x", None, -1, 1 << 63)),
    *(("calibration", value) for value in (3, b"x", [3])),
    *(("progress", value) for value in (3, "no")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values(tiny, text_file, tmp_path, name, value):
    with pytest.raises(CompressionError, match=name):
        compress(tiny, tmp_path / "slim", **{"calibration": text_file, **GOOD, name: value})
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy_are_numbers(tiny, text_file, tmp_path):
    options = GOOD | {"samples": np.int64(4), "keep": np.float32(0.5), "seed": np.int32(1)}
    report = compress(tiny, tmp_path / "slim", calibration=text_file, **options)
    assert report.options["samples"] == 4 and report.options["keep"] == 0.5


@pytest.mark.parametrize("name", ["plan.json", "text.jsonl"])
def test_json_that_is_too_deep(tiny, text_file, tmp_path, name):
    (tmp_path / name).write_text("[" * 100_000)
    given = {"plan": tmp_path / name} if name == "plan.json" else {"calibration": tmp_path / name}
    with pytest.raises(CompressionError, match=f"{name}.*not JSON"):
        compress(tiny, tmp_path / "slim", **{"calibration": text_file, **GOOD, **given})


def test_a_dry_run_leaves_the_random_generator(tiny, tmp_path):
    before = torch.random.get_rng_state()
    dry_run(tiny, tmp_path / "slim")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_name_that_is_too_long(tiny, text_file, tmp_path):
    for act in (lambda dst: compress(tiny, dst, calibration=text_file, **GOOD), lambda dst: dry_run(tiny, dst)):
        with pytest.raises(CheckpointWriteError, match="more than 237 bytes"):
            act(tmp_path / ("n" * 250))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "tokens", "sequences"),
    [
        ({}, 65_536, 176),
        ({"keep": 0.5}, 65_536, 176),
        ({"keep": 0.5, "speech": True}, 65_536, 176),
        ({"target_bytes": "45%"}, 65_536, 176),
        ({"elastic": True}, 0, 48),
        ({"keep": 0.5, "heal_tokens": 1_000}, 1_000, 50),
        ({"keep": 0.8, "heal_tokens": 1_000, "samples": 1}, 1_000, 3),
    ],
)
def test_healing_has_text_beside_that_of_calibration(options, tokens, sequences):
    found = options_of(**{"samples": 48, **options})
    assert (found.heal_tokens, found.text_samples) == (tokens, sequences)
