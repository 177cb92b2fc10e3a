"""EngineOptions: every option is checked before anything is loaded, and reaches the engine."""

import inspect
import math

import numpy as np
import pytest
import torch

import cai_runtime
from cai_runtime.engine.engine import Engine
from cai_runtime.errors import CaiError, MissingFileError
from cai_runtime.kernels import backend
from cai_runtime.options import ACTIVATIONS, BACKENDS, DTYPES, EngineOptions

# Option: (values that are taken, values of a wrong type, values out of range)
CASES = {
    "device": (["auto", "cpu", "cuda", "cuda:1", torch.device("cpu")], [3, b"cpu"], ["gpu", "cuda:", "cpu:0", "xpu"]),
    "dtype": (["auto", "fp32", "bfloat16", torch.float16], [16, ["fp32"]], ["int3", "", "fp64", torch.int8]),
    "keep": ([0.5, 1, np.float32(0.5)], ["0.5", True], [0, 1.5, math.nan]),
    "kv_cache": ([1 << 20, "2GiB", "1.5 mb", 0.5, 1.0, np.int64(4096)], [True, [1]], ["2 bananas", "", -5, 0, 0.0, 1.5,
                                                                               math.nan, "-1GiB", "9" * 500]),
    "kv_dtype": (["auto", "fp16", "int8"], [8], ["int4"]),
    "max_context": ([1, 64, np.int32(8)], ["64", 1.0, True], [0, -1, 10**5000]),
    "max_batch": ([1, 64], ["8", 1.5, True], [0, -1]),
    "prefill_chunk": ([1, 512], ["8", 1.5], [0]),
    "prefill_time": ([0.1, 1, math.inf, np.float32(1)], ["1", True], [0, -1, math.nan]),
    "prefix_cache": ([True, False, np.bool_(True)], ["no", 1, 0], []),
    "max_waiting": ([0, 9], ["9", 0.5, False], [-1]),
    "backend": (list(BACKENDS), [3], ["opencl", "", "CPU"]),
    "activations": (list(ACTIVATIONS), [True, 8], ["int4", "bf16", ""]),
    "cuda_graphs": ([True, False], ["yes", 1], []),
    "progress": ([True, False], ["yes", 1], []),
}  # fmt: skip


def cases(*columns):
    return [pytest.param(name, v, id=f"{name}-{i}-{j}")
            for name, values in CASES.items() for i in columns for j, v in enumerate(values[i])]  # fmt: skip


def test_every_option_has_its_cases_and_is_the_clients():
    assert set(CASES) == set(EngineOptions.__dataclass_fields__)
    for kind in (cai_runtime.Client, cai_runtime.AsyncClient):
        assert set(CASES) < set(inspect.signature(kind).parameters)


@pytest.mark.parametrize(("name", "value"), [*cases(0), *((name, None) for name in CASES)])
def test_taken(name, value):
    assert EngineOptions.of(cai_runtime.Client(**{name: value})._host._options) == EngineOptions.of({name: value})


@pytest.mark.parametrize(("name", "value"), cases(1))
def test_wrong_type_is_refused_at_once(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be") as caught:
        cai_runtime.Client("/nowhere", **{name: value})
    assert isinstance(caught.value, TypeError) and len(str(caught.value)) < 300


@pytest.mark.parametrize(("name", "value"), cases(2))
def test_out_of_range_is_refused_at_once(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be") as caught:
        cai_runtime.Client("/nowhere", **{name: value})
    assert isinstance(caught.value, CaiError) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"generation_config": "yes"}, ValueError, "generation_config must be"),
        ({"format": "chatml"}, ValueError, "format must be one of .*hermes"),
        ({"format": 3}, TypeError, "format must be"),
        ({"generation_config": np.array(["none", "model"])}, ValueError, "generation_config must be"),
        ({"keep": 10**5000}, ValueError, "keep must be in"),
        ({"timeout": "3"}, TypeError, "timeout must be"),
        ({"timeout": 0}, ValueError, "timeout must be"),
        ({"model": 3}, TypeError, "model must be"),
        ({"models": {"a": 3}}, TypeError, "models\\['a'\\] must be"),
        ({"models": {"a": "~nosuchuser/x"}}, ValueError, "models\\['a'\\] is no path"),
    ],
)
def test_other_arguments_of_a_client(options, kind, says):
    with pytest.raises(kind, match=says) as caught:
        cai_runtime.Client(**options)
    assert isinstance(caught.value, CaiError)


def test_unknown_option():
    with pytest.raises(TypeError, match="unknown option 'max_batches'"):
        EngineOptions.of(max_batches=3)


def test_names_are_those_of_torch_and_the_kernels():
    assert BACKENDS == backend.BACKENDS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES.values())


def test_given_makes_the_same_again():
    options = EngineOptions.of(kv_cache=0.5, prefix_cache=False, max_waiting=0, dtype="bf16")
    assert EngineOptions.of(options.given()) == options
    assert set(options.for_engine()) <= set(inspect.signature(Engine).parameters)


def test_options_and_tokenizer_are_checked_before_the_weights(tmp_path, monkeypatch):
    """A checkpoint that lacks its tokenizer costs no load."""
    from safetensors.torch import save_file

    from cai_runtime.engine import open as opening

    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(opening, "load_runner", lambda *args, **more: pytest.fail("the weights were loaded"))
    with pytest.raises(MissingFileError, match="tokenizer"):
        opening.open_engine(tmp_path)
    with pytest.raises(ValueError, match="max_batch must be"):
        opening.open_engine("/nowhere", max_batch=0)


def test_a_runner_whose_engine_does_not_start_is_closed():
    from cai_runtime.engine.open import start_engine

    class Runner:
        page_size, num_pages, max_context, vocab_size, closed = 16, 0, 64, 10, False

        def close(self):
            self.closed = True

    runner = Runner()
    with pytest.raises(Exception):  # noqa: B017 - whatever it is that Engine raises without a tokenizer
        start_engine(runner, None, EngineOptions(), eos_token_ids=None)
    assert runner.closed
