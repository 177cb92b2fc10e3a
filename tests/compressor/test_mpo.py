"""Matrix product operators: the reshape, the metric's Kronecker factors, errors by bond dimension, cores that train."""

import math
from itertools import pairwise

import pytest
import torch

from cai_runtime.compressor.factor.cores import StoredModule, mpo_module
from cai_runtime.compressor.factor.decompose import damped, whitened_error
from cai_runtime.compressor.factor.mpo import MpoTrain, Reshape, best_train, kronecker_factors, reshapes
from cai_runtime.compressor.train.student import TrainableLinear
from cai_runtime.slim.spec import STORES
from cai_runtime.slim.stores import quantize


def gram(n, seed, rows=200):
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return damped(x.mT @ x / rows)


def problem(reshape, seed=0):
    """A weight, and Gram matrices that are Kronecker products over its sites."""
    generator = torch.Generator().manual_seed(seed)
    out, inp = math.prod(reshape.out_dims), math.prod(reshape.in_dims)
    metrics = []
    for dims in (reshape.in_dims, reshape.out_dims):
        whole = torch.ones(1, 1, dtype=torch.float64)
        for k, d in enumerate(dims):
            whole = torch.kron(whole, gram(d, seed + k, 3 * d))
        metrics.append(whole)
    return torch.randn(out, inp, generator=generator), *metrics


def dense(cores, spec):
    return StoredModule(spec, [quantize(core, "fp32") for core in cores]).dense()


@pytest.mark.parametrize("sites", [1, 2, 3])
@pytest.mark.parametrize(("out", "inp"), [(24, 36), (7, 12), (1, 5), (64, 64)])
def test_reshapes_multiply_to_the_weight(out, inp, sites):
    found = reshapes(out, inp, sites)
    assert found
    for reshape in found:
        assert len(reshape.out_dims) == len(reshape.in_dims) == sites
        assert (math.prod(reshape.out_dims), math.prod(reshape.in_dims)) == (out, inp)
        spec = reshape.spec(max(1, reshape.widest // 2), "int8")
        assert spec.parameters == reshape.parameters(max(1, reshape.widest // 2))


def test_factors_are_as_even_as_can_be():
    assert reshapes(576, 1536)[0] == Reshape((24, 24), (32, 48))
    assert set(reshapes(12, 13)) == {Reshape(o, i) for o in ((3, 4), (4, 3)) for i in ((1, 13), (13, 1))}


@pytest.mark.parametrize("dims", [(6,), (4, 5), (3, 2, 4)])
def test_a_kronecker_product_is_found_again(dims):
    whole = torch.ones(1, 1, dtype=torch.float64)
    for k, d in enumerate(dims):
        whole = torch.kron(whole, gram(d, k))
    again = torch.ones(1, 1, dtype=torch.float64)
    for factor in kronecker_factors(whole, dims):
        assert bool((torch.linalg.eigvalsh(factor) > 0).all())
        again = torch.kron(again, factor)
    torch.testing.assert_close(again, whole)


def test_the_nearest_kronecker_product_of_a_general_matrix_is_positive():
    for factor in kronecker_factors(gram(24, 3, rows=10), (4, 6)):
        assert bool((torch.linalg.eigvalsh(factor) > 0).all())


@pytest.mark.parametrize("reshape", [Reshape((4, 6), (6, 6)), Reshape((2, 3, 4), (3, 4, 3)), Reshape((24,), (36,))])
def test_errors_are_those_of_the_cores(reshape):
    """Between Kronecker products the metric is exact: with two sites the error is the cores', with more a bound on it."""
    weight, inputs, outputs = problem(reshape)
    train = MpoTrain(weight, inputs, outputs, reshape)
    errors, whole = train.errors(), whitened_error(weight, inputs, outputs)
    assert len(errors) == reshape.widest + 1
    assert all(a >= b for a, b in pairwise(errors))
    for widest in range(1, reshape.widest + 1, 3):
        found = dense(train.cores(widest), reshape.spec(widest, "fp32"))
        actual = whitened_error(found - weight, inputs, outputs)
        if len(reshape.out_dims) == 2:
            assert actual == pytest.approx(errors[widest], rel=1e-4, abs=1e-10 * whole)
        else:
            assert actual <= errors[widest] + 1e-6 * whole  # cores are fp32
    full = dense(train.cores(reshape.widest), reshape.spec(reshape.widest, "fp32"))
    torch.testing.assert_close(full, weight, atol=1e-5, rtol=1e-5)


def test_the_metric_pays():
    reshape = Reshape((4, 6), (6, 6))
    weight, inputs, outputs = problem(reshape)
    plain = MpoTrain(weight, torch.eye(36, dtype=torch.float64), None, reshape)
    found = {
        name: whitened_error(dense(train.cores(8), reshape.spec(8, "fp32")) - weight, inputs, outputs)
        for name, train in (("plain", plain), ("weighed", MpoTrain(weight, inputs, outputs, reshape)))
    }
    assert found["weighed"] < 0.8 * found["plain"]


def test_the_best_reshape_has_the_least_error():
    """A weight that is a train in one reshape is found to be one."""
    reshape = Reshape((3, 4), (4, 3))
    cores = [torch.randn(1, 3, 4, 2), torch.randn(2, 4, 3, 1)]
    weight = dense(cores, reshape.spec(2, "fp32"))
    found, errors = best_train(weight, torch.eye(12, dtype=torch.float64), None, 0.4)
    assert found == reshape
    assert errors[2] < 1e-9 * errors[0]


@pytest.mark.parametrize("store", ["fp32", "bf16", "int8", "int4-g32"])
@pytest.mark.parametrize("reshape", [Reshape((4, 6), (6, 6)), Reshape((2, 3, 4), (3, 4, 3))])
def test_a_train_of_cores_trains_and_is_stored(store, reshape):
    weight, inputs, outputs = problem(reshape)
    module = mpo_module(MpoTrain(weight, inputs, outputs, reshape), 7, store)
    assert [core.store for core in module.cores] == [store] * len(reshape.out_dims)
    layer = TrainableLinear(module)
    x = torch.randn(3, 5, 36)
    torch.testing.assert_close(layer(x), x @ module.dense().T, atol=1e-4, rtol=1e-4)
    layer(x).square().sum().backward()
    assert all(core.latent.grad is not None and bool(core.latent.grad.any()) for core in layer.parts())
    again = TrainableLinear.restore(module.spec, layer.tensors())
    for a, b in zip(again.stored().cores, module.cores, strict=True):
        assert a.shape == b.shape and torch.equal(a.data, b.data)
        a.check_layout()
    assert len(STORES[store].tensors(module.cores[0].shape)) == len(module.cores[0].tensors)
