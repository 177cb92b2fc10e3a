"""What the GPU suite makes of raw figures: a profile's kernels, ncu's table, bits of floats, predictions."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from unittest.mock import create_autospec

import pytest

torch = pytest.importorskip("torch")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_table_of_compiled_kernels_calls_the_tests_as_they_are(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    compiled = importlib.import_module("gpu_compiled")
    tests = importlib.import_module("test_triton_compiled")
    called = []
    for name in [name for name in vars(tests) if name.startswith("test_")]:
        monkeypatch.setattr(tests, name, create_autospec(getattr(tests, name)))
    monkeypatch.setattr(compiled.Table, "run", lambda table, tests, case, test: (called.append(case), test()))
    compiled.kernels(monkeypatch)
    assert len(called) == len(set(called)) > 100


LAYER = ["paged_attention_kernel", "merge_splits_kernel", *["cai::decode_products_kernel<bf16>(Rows)"] * 8, "rope"]
MICROSECONDS = [10.0, 2.0, 8.0, 4.0, 11.0, 31.0, 30.0, 5.0, 9.0, 5.0, 1.0]


def profile(layers: int, replays: int, gap: float = 0.5) -> list[tuple[str, float, float]]:
    kernels, now = [], 0.0
    for _ in range(replays):
        step = [("embedding", 3.0), *zip(LAYER[-3:], MICROSECONDS[-3:], strict=True)]
        step += list(zip(LAYER, MICROSECONDS, strict=True)) * (layers - 1)
        step += [*zip(LAYER[:8], MICROSECONDS[:8], strict=True), ("head", 350.0)]
        for name, took in step:
            kernels.append((name, now, took))
            now += took + gap
    return kernels


def test_launches_of_a_layer_are_named_by_what_they_multiply():
    timeline = importlib.import_module("gpu.timeline")
    launches = timeline.layer_launches(profile(4, timeline.REPLAYS), 4)
    found = {launch["launch"]: (launch["microseconds"], launch["gap_microseconds"]) for launch in launches}
    assert found["o 0"] == (8.0, 0.5) and found["gate/up 1"] == (31.0, 0.5)
    assert found["down 0"] == (30.0, 0.5) and found["q/k/v 1"] == (5.0, 0.5)
    assert found["paged_attention_kernel"] == (10.0, 0.5) and len(launches) == len(LAYER)


def test_a_profile_that_is_not_the_same_in_each_layer_is_not_named():
    timeline = importlib.import_module("gpu.timeline")
    kernels = profile(4, timeline.REPLAYS)
    assert timeline.layer_launches(kernels[:-30], 4) == []
    assert timeline.layer_launches(kernels, 5) == []


def test_kernels_by_name_say_the_gap_to_the_next():
    timeline = importlib.import_module("gpu.timeline")
    found = timeline.by_name([("a", 0.0, 2.0), ("b", 3.0, 5.0), ("a", 7.5, 1.0)])
    assert list(found) == ["b", "a"]  # the longest first
    assert found["b"] == {"count": 1, "microseconds": 5.0, "median_microseconds": 5.0, "gap_microseconds": -0.5}
    assert found["a"]["count"] == 2 and found["a"]["gap_microseconds"] == 0.5  # 1, and none after the last


def test_the_table_of_hardware_counters_is_read():
    counters = importlib.import_module("gpu.counters")
    table = (
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","products_kernel","DRAM Throughput","%","81.5"\n"0","products_kernel","Ignored","","1"\n'
        '"1","swiglu_kernel","Grid Size","","7"\n'
    )
    first, second = counters.read_ncu(table)
    assert first == {"what": "ncu", "kernel": "products_kernel", "DRAM Throughput": "81.5 %"}
    assert second["Grid Size"] == "7"
    with pytest.raises(RuntimeError, match="wrote no table: ==ERROR=="):
        counters.read_ncu("==ERROR== no permission")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distance_in_units_of_the_last_place(dtype: torch.dtype):
    ulp_distance = importlib.import_module("gpu.bits").ulp_distance
    x = torch.tensor([1.0, -1.0, 0.0, 3.5], dtype=dtype)
    step = torch.tensor([1, 1, 0, 3], dtype=torch.int16)
    y = (x.view(torch.int16) + step).view(dtype)
    assert ulp_distance(x, y).tolist() == [1, 1, 0, 3]
    smallest = torch.tensor([1, -32767], dtype=torch.int16).view(dtype)  # of either sign, on both sides of zero
    assert ulp_distance(smallest[:1], smallest[1:]).tolist() == [2]


def test_every_timed_case_of_the_model_has_a_prediction():
    context = importlib.import_module("gpu.context")
    for backend in ("cuda", "triton"):
        for kind, store in context.VARIANTS:
            for rows in context.REAL.decode_rows:
                assert context.predicted_step(backend, f"{kind} {store}", rows) > 0
                launches = context.predicted_launches(backend, f"{kind} {store}", rows)
                assert len(launches) == (4 if kind == "dense" else 8) and min(launches.values()) > 0
    assert context.predicted_step("triton", "dense bf16", 3) is None


def test_kernels_that_measure_the_machine_compile_for_hopper():
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("kernels are interpreted here, not compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernels = importlib.import_module("gpu.roof_kernels")

    def ptx(kernel, constants=None, **types) -> str:
        signature = types | dict.fromkeys(constants or {}, "constexpr")
        places = {(list(signature).index(name),): value for name, value in (constants or {}).items()}
        source = ASTSource(kernel, signature, constexprs=places)
        return compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

    assert "griddepcontrol" not in ptx(kernels.nothing, x="*fp32")
    dependent = ptx(kernels.nothing_dependent, x="*fp32")
    assert dependent.index("griddepcontrol.wait") < dependent.index("griddepcontrol.launch_dependents")
    assert "ld.global" in ptx(kernels.read, {"BLOCK": 1024}, x="*i32", out="*i32", steps="i32")
    barriers = ptx(kernels.barriers, counter="*i32", programs="i32", rounds="i32")
    assert "atom" in barriers and "acq_rel" in barriers


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_launches_of_real_shapes_take_every_tile_and_fit():
    """Cut by the library's own plan; predicted for each of them."""
    predict = importlib.import_module("gpu.predict")
    for keep in (0.5, None):
        cuts = predict.launches(132, keep, rows=(1, 4, 16))
        assert {c["store"] for c in cuts} == {"bf16", "int8", "int4/128"}
        for cut in cuts:
            assert 0 < cut["blocks"] <= 132 and cut["blocks"] % cut["cluster"] == 0, cut
            assert cut["rounds"] * cut["blocks"] >= cut["tiles"], cut
            assert cut["bytes_under_way"] < cut["shared_bytes"] <= 227 << 10, cut
            floor = cut["weights"] * predict.STORES[cut["store"]][0] / predict.BANDWIDTH * 1e6
            assert floor - predict.OVERLAP < predict.launch_microseconds(cut) < 2 * floor + 5, cut
