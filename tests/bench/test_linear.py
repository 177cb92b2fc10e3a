import json
import time
from dataclasses import replace

import pytest
import torch

from cai_runtime.bench import contenders, linear
from cai_runtime.bench.factors import KINDS, Factorization
from cai_runtime.bench.floors import floor
from cai_runtime.bench.linear import LinearSettings, bench_linear, checked_rows
from cai_runtime.bench.linear_report import draw_linear, format_linear, linear_json, token_totals
from cai_runtime.cli import main
from cai_runtime.errors import BenchmarkError, KernelError
from cai_runtime.models.shapes import LinearGroup, parse_shape

HALF = Factorization("interpolative", 0.5)


@pytest.fixture
def bench(roofs, once):
    def run(*shapes, how=HALF, of_model=False, reader=None, **changes):
        settings = LinearSettings(
            **{"how": how, "batches": (1, 3), "threads": 1, "schedule": once, "stores": ("fp32", "int8"), **changes}
        )
        groups = [s if isinstance(s, LinearGroup) else parse_shape(s) for s in shapes]
        return bench_linear(
            groups, settings, subject="test", of_model=of_model, roofs=lambda device, threads: roofs, reader=reader
        )

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs_beside_torch_and_is_right(bench, kind):
    report = bench("96x64+32", how=Factorization(kind, 0.5), backends=("cpu", "reference"))
    assert {(r.engine, r.method, r.store) for r in report.results} == {
        *((backend, kind, store) for backend in ("cpu", "reference") for store in ("fp32", "int8")),
        ("torch", "dense", "fp32"),
        ("torch", "dense", "bf16"),
        *(("torch", "two matmuls", store) for store in ("fp32", "bf16") if kind in ("lowrank", "interpolative")),
    }
    for r in report.results:
        assert r.unsupported is None
        assert 0 < r.best_s <= r.median_s
        assert 0 <= r.relative_error < (2e-2 if r.activations == "bfloat16" else 1e-4)
        assert (r.sets, r.judge) == (1, "float64")
        if r.method == kind and kind != "dense":
            assert 0.3 < r.keep <= 0.5
            assert len(r.ranks) == 2


def test_the_read_bandwidth_is_taken_in_turns(bench):
    calls = []

    def reader(device):
        assert device == "cpu"
        return lambda: calls.append(time.sleep(0.002)), 10**6

    report = bench("64x48", reader=reader)
    assert len(calls) >= 2  # for each number of rows, at least once
    for r in report.results:
        assert 0 < r.roofs.read <= 5e8 and r.roofs.matmul == {"float32": 1e11, "bfloat16": 4e11}
        assert floor(r) == r.roofs.floor(r.weight_bytes, r.flops, r.activations)
    assert report.roofs.read == max(r.roofs.read for r in report.results)


def test_figures_follow_from_bytes_operations_and_times(bench):
    report = bench("64x48", how=Factorization("lowrank", rank=16))
    r = next(r for r in report.results if (r.engine, r.store, r.batch) == ("cpu", "int8", 3))
    assert r.weight_bytes == 16 * 64 + 48 * 16 + 4 * (16 + 48)
    assert r.flops == 3 * 2 * 16 * (64 + 48)
    assert floor(r) == max(r.weight_bytes / 1e10, r.flops / 1e11)
    figures = next(
        f for f in linear_json(report)["results"] if (f["engine"], f["store"], f["batch"]) == ("cpu", "int8", 3)
    )
    assert figures["gb_per_s"] == pytest.approx(r.weight_bytes / r.median_s / 1e9)
    assert figures["gflop_per_s"] == pytest.approx(r.flops / r.median_s / 1e9)
    assert figures["floor_fraction"] == pytest.approx(figures["floor_s"] / r.median_s)
    dense = next(d for d in report.results if (d.method, d.store, d.batch) == ("dense", "fp32", 3))
    assert figures["speedup_over_dense_fp32"] == pytest.approx(dense.median_s / r.median_s)


def test_torch_s_own_int4_kernel_is_held_against_the_same_reference(bench):
    report = bench("128x64", stores=("int4",), backends=("reference",), int4_group=64)
    found = {(r.engine, r.method): r for r in report.results if r.store == "int4"}
    assert set(found) == {("torch", "tinygemm"), ("reference", "interpolative"), ("reference", "dense")}
    assert found["torch", "tinygemm"].relative_error < 5e-3


def test_what_a_backend_can_t_do_is_shown_with_its_reason(bench):
    report = bench("96x64", backends=("cpu", "triton"), batches=(1,))
    refused = [r for r in report.results if r.engine == "triton"]
    assert [r.store for r in refused] == ["fp32", "int8"]
    assert all(r.median_s is None and "can't run on cpu" in r.unsupported for r in refused)
    table = format_linear(report)
    assert "fp32, int8" in table  # of one line
    assert "[1] not supported: the triton kernels can't run on cpu" in table
    assert json.dumps(linear_json(report))


def test_a_gpu_s_table_has_a_column_of_launches(bench):
    report = bench("64x48", batches=(1,), backends=("cpu", "triton"))
    assert "launches" not in format_linear(report)
    assert all(r.launches is None for r in report.results)
    on_gpu = replace(
        report,
        settings=replace(report.settings, device="cuda:0"),
        gpus=[{"name": "H100"}],
        results=[replace(r, launches=2.0 if r.engine == "cpu" else None) for r in report.results],
    )
    head, *rows = [line for line in format_linear(on_gpu).splitlines() if "int8" in line or "launches" in line]
    at = head.index("launches") + len("launches") - 1
    assert [row[at] for row in rows] == ["2", "-"]
    assert {f["launches"] for f in linear_json(on_gpu)["results"] if f["engine"] == "cpu"} == {2.0}


def test_a_wrong_result_is_an_error_and_no_figure(bench, monkeypatch):
    def broken(backend, members, arena):
        return lambda x: torch.zeros(x.shape[0], sum(w.out_features for w in members))

    monkeypatch.setattr(contenders, "our_linear", broken)
    with pytest.raises(
        BenchmarkError, match=r"cpu interpolative fp32 is wrong on 64x48, 1 rows: relative error 1\.0e\+00"
    ):
        bench("64x48")


def test_one_wrong_row_of_the_last_is_seen(bench, monkeypatch):
    real = contenders.our_linear

    def broken(backend, members, arena):
        run = real(backend, members, arena)

        def last_row_lost(x):
            y = run(x)
            if len(x) > 1:
                y[-1] = 0
            return y

        return last_row_lost

    monkeypatch.setattr(contenders, "our_linear", broken)
    with pytest.raises(BenchmarkError, match="is wrong on 64x48, 3 rows"):
        bench("64x48")


def test_a_failure_at_one_number_of_rows_leaves_the_others(bench, monkeypatch):
    real = contenders.our_linear

    def one_row_only(backend, members, arena):
        run = real(backend, members, arena)

        def limited(x):
            if len(x) > 1:
                raise KernelError("one row at a time")
            return run(x)

        return limited

    monkeypatch.setattr(contenders, "our_linear", one_row_only)
    report = bench("64x48")
    ours = {r.batch: r for r in report.results if r.engine == "cpu" and r.store == "fp32"}
    assert ours[1].median_s and ours[3].unsupported == "one row at a time"


def test_rows_that_are_checked():
    assert checked_rows(1) == [0]
    assert checked_rows(3) == [0, 1, 2]
    rows = checked_rows(512)
    assert (len(rows), rows[0], rows[-1]) == (8, 0, 511)


def test_the_sum_over_a_model_counts_each_group_as_often_as_a_token_meets_it(bench):
    groups = (LinearGroup("qkv", 64, (32, 16), 3, 3), LinearGroup("expert", 32, (64,), 24, 6))
    report = bench(*groups, of_model=True)
    totals = {t["kernel"]: t for t in token_totals(report)}
    ours = {r.group: r for r in report.results if r.label == "cpu interpolative int8" and r.batch == 1}
    assert totals["cpu interpolative int8"]["ms"] == pytest.approx(
        1e3 * (3 * ours["qkv"].median_s + 6 * ours["expert"].median_s)
    )
    assert "all linears of one token" in format_linear(report)
    assert token_totals(bench("64x32")) == []


def test_peers_can_be_left_out(bench):
    report = bench("64x48", peers=False)
    assert {r.engine for r in report.results} == {"cpu"}
    assert report.speedup(report.results[0], "fp32") is None


def test_settings_that_make_no_sense_are_refused():
    for wrong, said in (
        ({"stores": ("fp8",)}, "unknown store 'fp8'"),
        ({"int4_group": 16}, "group is 16"),
        ({"batches": (0,)}, "at least 1"),
        ({"backends": ("metal",)}, "unknown backend 'metal'; there are: reference, cpu, triton, cuda"),
    ):
        with pytest.raises(BenchmarkError, match=said):
            LinearSettings(**wrong)


def test_the_plot_is_a_picture_with_the_roofs_and_points(bench, tmp_path):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    import matplotlib.image

    draw_linear(bench("64x48"), tmp_path / "plot.png")
    pixels = matplotlib.image.imread(tmp_path / "plot.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800
    assert pixels[..., :3].std() > 0.02  # not empty
    ours = torch.tensor([0x00, 0x72, 0xB2]) / 255
    assert (torch.tensor(pixels[..., :3]) - ours).abs().amax(-1).lt(0.15).sum() > 20  # points of our kernel


def test_without_matplotlib_the_extra_is_named_before_anything_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("cai_runtime.bench.roofline.find_spec", lambda name: None)
    monkeypatch.setattr("cai_runtime.bench.linear.bench_linear", lambda *_, **__: pytest.fail("something ran"))
    assert main(["bench", "linear", "--shape", "8x8", "--plot", str(tmp_path / "p.png")]) == 1
    assert "cai-runtime[bench]" in capsys.readouterr().err


def test_the_command_writes_a_table_json_and_a_plot(tmp_path, capsys, monkeypatch, roofs):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    monkeypatch.setattr(
        linear.bench_linear,
        "__kwdefaults__",
        {**linear.bench_linear.__kwdefaults__, "roofs": lambda *_: roofs, "reader": None},
    )
    out, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    arguments = ["--shape", "64x32+16", "--keep", "0.4", "--store", "fp32,int8", "--batch", "1,2", "--threads", "1"]
    quick = ["--rounds", "1", "--seconds", "0", "--device", "cpu"]
    assert main(["bench", "linear", *arguments, *quick, "--json", str(out), "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["benchmark"] == "linear"
    assert found["roofs"] == {"read_gb_per_s": 10, "matmul_gflop_per_s": {"float32": 100, "bfloat16": 400}}
    assert found["settings"]["how"] == {"kind": "interpolative", "keep": 0.4, "rank": None}
    assert found["machine"]["cpu"] and found["versions"]["torch"] and found["date"]
    assert {r["batch"] for r in found["results"]} == {1, 2}
    for r in found["results"]:
        assert f"{r['median_s'] * 1e3:,.3f}" in table
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_are_named_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setattr("cai_runtime.bench.linear.bench_linear", lambda *_, **__: pytest.fail("something ran"))
    for arguments, named in (
        (["--model", "llama-9"], "no shapes of 'llama-9'"),
        (["--only", "qkv,nothing"], "no linears named 'nothing'"),
        (["--shape", "8x8", "--model", "smollm2-135m"], "--shape stands for itself"),
        (["--shape", "8"], "'8' is no shape"),
        (["--kind", "svd"], "unknown kind 'svd'"),
        (["--store", "fp8"], "unknown store 'fp8'"),
        (["--backend", "metal"], "unknown backend 'metal'"),
        (["--keep", "2"], "keep is 2"),
        (["--rounds", "0"], "rounds is 0"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at"),
        (["--plot", "/nowhere/at/all.png"], "--plot"),
        (["--device", "tpu"], "tpu"),
    ):
        assert main(["bench", "linear", *arguments]) == 1
        assert named in capsys.readouterr().err
    for arguments in (["--batch", "1,x"], ["--batch", "0"], ["--store", "fp32,,int8"]):
        with pytest.raises(SystemExit) as left:
            main(["bench", "linear", *arguments])
        assert left.value.code == 2
        capsys.readouterr()
