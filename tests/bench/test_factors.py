import pytest
import torch

from cai_runtime.bench.factors import (
    KINDS,
    STORES,
    Factorization,
    RandomWeights,
    balanced,
    flops_per_row,
    highest_rank,
    rank_for_keep,
    stored_bytes,
)
from cai_runtime.errors import BenchmarkError
from cai_runtime.kernels.slim_linear import reference


def parameters(kind, inp, out, rank):
    if kind == "mpo":
        (o0, o1), (i0, i1) = balanced(out), balanced(inp)
        return rank * (o0 * i0 + o1 * i1)
    return rank * (inp + out - (rank if kind == "interpolative" else 0))


@pytest.mark.parametrize("kind", ["lowrank", "interpolative", "mpo"])
@pytest.mark.parametrize(("inp", "out"), [(4096, 4096), (4096, 14336), (14336, 4096), (576, 192), (37, 11), (1, 5)])
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.8])
def test_a_rank_is_the_largest_that_keeps_no_more(kind, inp, out, keep):
    rank = rank_for_keep(kind, inp, out, keep, multiple=1)
    assert 1 <= rank <= highest_rank(kind, inp, out)
    assert rank == 1 or parameters(kind, inp, out, rank) <= keep * inp * out
    if rank < highest_rank(kind, inp, out):
        assert parameters(kind, inp, out, rank + 1) > keep * inp * out


def test_ranks_are_multiples_of_16_as_the_compressor_s():
    assert rank_for_keep("interpolative", 4096, 4096, 0.5) == 1199 // 16 * 16
    assert rank_for_keep("interpolative", 37, 11, 0.5) == rank_for_keep("interpolative", 37, 11, 0.5, multiple=1) < 16


def test_keeping_everything_is_the_full_rank_of_an_interpolative_linear():
    assert rank_for_keep("interpolative", 64, 48, 1.0) == 48
    assert rank_for_keep("lowrank", 64, 64, 1.0) == 32


def test_a_rank_given_by_hand_wins_and_is_bounded():
    assert Factorization("lowrank", rank=7).rank_of(64, 32) == 7
    with pytest.raises(BenchmarkError, match="rank 33 is too high"):
        Factorization("lowrank", rank=33).rank_of(64, 32)
    for wrong, said in (
        ({"kind": "svd"}, "svd"),
        ({"keep": 0.0}, "keep is 0"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"rank": 0}, "rank is 0"),
    ):
        with pytest.raises(BenchmarkError, match=said):
            Factorization(**{"kind": "lowrank", **wrong})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", STORES)
def test_weights_have_the_size_that_was_foretold_and_the_scale_of_real_ones(kind, store):
    how = Factorization(kind, 0.5)
    w = RandomWeights("cpu", group=32).linear(256, 192, how, store)
    assert w.kind == kind
    assert {core.store for core in w.cores} == {store}
    assert w.nbytes == stored_bytes(how, 256, 192, store, 32)
    x = torch.randn(64, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = reference(x, w)
    assert 0.3 < float(y.std()) < 3


def test_no_two_rows_and_no_two_linears_are_the_same():
    draw = RandomWeights("cpu")
    first, second = draw.group_of(96, (64, 64), Factorization("dense"), "int8")
    rows = torch.cat([first.cores[0].data, second.cores[0].data])
    assert len(rows.unique(dim=0)) == 128
    again = RandomWeights("cpu").linear(96, 64, Factorization("dense"), "int8")
    assert torch.equal(again.cores[0].data, first.cores[0].data)


@pytest.mark.parametrize("store", ["fp32", "int4"])
def test_a_core_larger_than_the_pool_goes_on_from_its_start(store, monkeypatch):
    monkeypatch.setattr("cai_runtime.bench.factors.POOL", 997)
    core = RandomWeights("cpu", group=32).core(40, 65, store)
    values = core.values(torch.float64)
    assert values.isfinite().all()
    assert len(values.unique(dim=0)) == 40


def test_operations_are_those_of_the_factors_as_they_are_multiplied():
    draw = RandomWeights("cpu")
    lowrank = draw.linear(64, 32, Factorization("lowrank", rank=8), "fp32")
    assert flops_per_row(lowrank) == 2 * 8 * (64 + 32)
    interpolative = draw.linear(64, 32, Factorization("interpolative", rank=8), "fp32")
    assert flops_per_row(interpolative) == 2 * 8 * (64 + 32 - 8)
    # 64 = 8 x 8, 32 = 4 x 8, bond 5: the first core meets all 8 rests, the second all 4 outputs of the first.
    mpo = draw.linear(64, 32, Factorization("mpo", rank=5), "fp32")
    assert flops_per_row(mpo) == 2 * (8 * (4 * 5 * 8) + 4 * (8 * 5 * 8))
