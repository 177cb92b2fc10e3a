"""LayerNorm, GELU, added rows and convolution on rows of every layout: within a derived bound of float64
(helpers/error_bounds.py); and, on the CPU kernels, the same bits alone, in any batch, with any threads and recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from error_bounds import Bounded, check, gelued, layer_normed, linear
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    CPU,
    FLOATS,
    ROWS,
    bits_equal,
    bounded,
    groups,
    random_core,
    sizes,
    tensors,
    threads,
    using,
)

from cai_runtime.errors import KernelError
from cai_runtime.kernels.activation import gelu_cpu, gelu_reference
from cai_runtime.kernels.convolution import Convolution, CpuConvolution, TorchConvolution
from cai_runtime.kernels.embedding import add_rows, add_rows_cpu
from cai_runtime.kernels.norm import LayerNorm, RmsNorm, layer_norm_cpu, layer_norm_reference, layer_norm_torch
from cai_runtime.kernels.prepare import prepare
from cai_runtime.kernels.program import Axis, Input, record
from cai_runtime.kernels.slim_linear import as_dense

OPERATIONS = {"cpu": (layer_norm_cpu, gelu_cpu), "reference": (layer_norm_reference, gelu_reference)}
CONVOLUTIONS: dict[str, type[Convolution]] = {"cpu": CpuConvolution, "reference": TorchConvolution}
DTYPES = {"reference": [torch.float32, torch.bfloat16, torch.float16]}  # others: fp32
WIDTHS = sizes(200) | st.sampled_from([384, 1000, 4099])


@st.composite
def layer_norms(draw: st.DrawFn, width: int, dtype: torch.dtype = torch.float32) -> LayerNorm:
    weight, bias = (draw(tensors(1, width, dtype, ["contiguous"]))[0] for _ in range(2))
    return LayerNorm(weight, bias, draw(st.sampled_from([1e-6, 1e-5, 0.1])))


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@bounded(60)
def test_layer_norm_and_gelu_are_within_the_bound(backend: str, data: st.DataObject):
    dtype = data.draw(st.sampled_from(DTYPES.get(backend, [torch.float32])))
    rows, width = data.draw(st.sampled_from(ROWS)), data.draw(WIDTHS)
    norm = data.draw(layer_norms(width, dtype))
    x = data.draw(tensors(rows, width, dtype)) * data.draw(st.sampled_from([0.1, 1.0, 50.0]))
    x = x + data.draw(st.sampled_from([0.0, 3.0]))
    with using(backend) as name:
        layer_norm, gelu = OPERATIONS[name]
        check(layer_norm(x, norm.weight, norm.bias, norm.eps), lambda growth: layer_normed(x, norm, dtype, growth))
        check(gelu(x), lambda growth: gelued(x, dtype))


@pytest.mark.parametrize("backend", CPU)
def test_gelu_is_exact_within_a_millionth(backend: str):
    x = torch.linspace(-9, 9, 400_000)[None]
    with using(backend):
        y = gelu_cpu(x)
        ends = gelu_cpu(torch.tensor([[-1e30, -100.0, -0.0, 0.0, 1e-40, 100.0, 1e30, float("inf"), float("nan")]]))
    assert (y.double() - gelu_reference(x.double())).abs().max() < 1e-6
    assert not ends[0, :4].any() and ends[0, 5:8].tolist() == [100.0, torch.tensor(1e30).item(), float("inf")]
    assert ends[0, 8].isnan() and 0 <= ends[0, 4] < 1e-40


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@bounded(40)
def test_a_linear_norms_or_gates_its_input(backend: str, data: st.DataObject):
    members = [c.build() for c in data.draw(groups())]
    inp, rows = members[0].in_features, data.draw(st.sampled_from(ROWS))
    norm, x = data.draw(layer_norms(inp)), data.draw(tensors(rows, inp))
    residual = data.draw(st.none() | tensors(rows, sum(w.out_features for w in members)))
    with using(backend) as name:
        group = prepare(members, backend=name)
        normed, gated = group(x, residual, norm=norm), group(x, residual, gelu=True)
        with pytest.raises(KernelError, match="not both"):
            group(x, norm=norm, gelu=True)
    for y, before in (
        (normed, lambda growth: layer_normed(x, norm, x.dtype, growth)),
        (gated, lambda growth: gelued(x, x.dtype)),
    ):

        def within(growth, before=before) -> Bounded:
            parts = [linear(before(growth), w, x.dtype, growth=growth) for w in members]
            whole = Bounded(torch.cat([p.value for p in parts], dim=1), torch.cat([p.error for p in parts], dim=1))
            return whole if residual is None else whole.plus(residual, x.dtype)

        check(y, within)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int, int, int]:
    """weight, bias, stride, rows of a window, windows."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    out, inp, stride = draw(sizes(70)), draw(sizes(100)), draw(st.integers(1, 3))
    rows = stride * draw(st.sampled_from([1, 2, 3, 10, 33]))
    weight = random_core(out, 3 * inp, draw(st.sampled_from([*FLOATS])), g).data.view(out, inp, 3)
    return weight, torch.randn(out, generator=g), stride, rows, draw(st.integers(0, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@bounded(60)
def test_a_convolution_is_within_the_bound(backend: str, data: st.DataObject):
    weight, bias, stride, rows, windows = data.draw(convolutions())
    x, gelu = data.draw(tensors(windows * rows, weight.shape[1])), data.draw(st.booleans())
    with using(backend) as name:
        y = CONVOLUTIONS[name](weight, bias, stride, rows)(x, gelu=gelu)
    before = gelued(x, x.dtype) if gelu else Bounded.exact(x)

    def taps(values: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(values.view(windows, rows, weight.shape[1]), (0, 0, 1, 1))
        return padded.unfold(1, 3, stride).reshape(
            windows * rows // stride, 3 * weight.shape[1]
        )  # as weight.flatten(1)

    matrix = as_dense(type(random_core(1, 1, "fp32", torch.Generator()))(weight.flatten(1)), bias)
    seen = Bounded(taps(before.value), taps(before.error))
    # The reference rounds a narrow weight to fp32, exactly; torch's own order of sums is bounded like any other.
    check(y, lambda growth: linear(seen, matrix, x.dtype, growth=growth))


def test_rows_side_by_side_are_the_same_rows():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2 * 12, 5, generator=g)
    first = CpuConvolution(torch.randn(7, 5, 3, generator=g), torch.randn(7, generator=g), 1, 12)
    second = CpuConvolution(torch.randn(6, 7, 3, generator=g), torch.randn(6, generator=g), 2, 12)
    apart = second(first(x), gelu=True)
    together = second(first(x.view(12, 10)), gelu=True)
    assert apart.shape == together.shape == (12, 6) and bits_equal(apart, together)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@bounded(30)
def test_added_rows_are_the_tables(backend: str, data: st.DataObject):
    rows, width, size = data.draw(st.sampled_from(ROWS)), data.draw(sizes(100)), data.draw(st.integers(1, 20))
    x, table = data.draw(tensors(rows, width)), data.draw(tensors(size, width, layouts=["contiguous"]))
    index = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=rows, max_size=rows)), dtype=torch.int32)
    with using(backend) as name:
        add = add_rows_cpu if name == "cpu" else add_rows
        assert bits_equal(add(x, table, index), x + table[index.long()])
        assert bits_equal(add(x, table), x + table[torch.arange(rows) % size])
        if rows:
            for bad in (-1, size):
                with pytest.raises(KernelError, match=str(bad)):
                    add(x, table, index.clone().index_fill_(0, torch.tensor([rows - 1]), bad))


@pytest.mark.parametrize("backend", CPU)
@given(data=st.data())
@bounded(30)
def test_a_row_has_the_same_bits_in_any_batch(backend: str, data: st.DataObject):
    members = [c.build() for c in data.draw(groups())]
    inp, rows = members[0].in_features, data.draw(st.sampled_from([2, 9, 33, 150, 300]))
    norm, x = data.draw(layer_norms(inp)), data.draw(tensors(rows, inp, layouts=["contiguous"]))
    int8_activations = data.draw(st.booleans())
    row = data.draw(st.integers(0, rows - 1))
    with using(backend) as name:
        group = prepare(members, backend=name, int8_activations=int8_activations)
        calls: list[Callable[[torch.Tensor], torch.Tensor]] = [
            lambda v: layer_norm_cpu(v, norm.weight, norm.bias, norm.eps),
            gelu_cpu,
            lambda v: group(v, norm=norm),
            lambda v: group(v, gelu=True),
        ]
        for call in calls:
            together = call(x)
            assert bits_equal(call(x[row : row + 1]), together[row : row + 1])
            assert bits_equal(torch.cat([call(x[:row]), call(x[row:])]), together)
            with threads(data.draw(st.integers(1, 4))):
                assert bits_equal(call(x), together)


@pytest.mark.parametrize("backend", CPU)
@given(data=st.data())
@bounded(30)
def test_a_window_has_the_same_bits_in_any_batch(backend: str, data: st.DataObject):
    weight, bias, stride, rows, windows = data.draw(convolutions())
    windows += 1
    x = data.draw(tensors(windows * rows, weight.shape[1], layouts=["contiguous"]))
    with using(backend):
        convolution = CpuConvolution(weight, bias, stride, rows)
        together = convolution(x, gelu=True)
        alone = [convolution(w, gelu=True) for w in x.split(rows)]
        assert bits_equal(torch.cat(alone), together)
        with threads(data.draw(st.integers(1, 4))):
            assert bits_equal(convolution(x, gelu=True), together)


class Encoder:
    """A small encoder's way in, a block without attention, and a decoder's positions, over rows of two axes."""

    def __init__(self, d: int, mels: int, rows: int):
        g = torch.Generator().manual_seed(d)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

        self.first = CpuConvolution(normal(d, mels, 3), normal(d), 1, 2 * rows)
        self.second = CpuConvolution(normal(d, d, 3).half(), normal(d), 2, 2 * rows)
        self.positions, self.norm = normal(rows, d), LayerNorm(normal(d), normal(d), 1e-5)
        self.up = prepare([as_dense(random_core(4 * d, d, "fp16", g), normal(4 * d))], backend="cpu")
        self.down = prepare([as_dense(random_core(d, 4 * d, "int8", g), normal(d))], backend="cpu")

    def __call__(self, frames, index):
        x = add_rows_cpu(gelu_cpu(self.second(self.first(frames), gelu=True)), self.positions)
        x = self.down(self.up(x, norm=self.norm), x, gelu=True)
        x = add_rows_cpu(x, self.positions, index)
        return layer_norm_cpu(x, self.norm.weight, self.norm.bias, self.norm.eps)


@pytest.mark.parametrize("backend", CPU)
def test_a_recorded_encoder_has_the_bits_of_the_single_calls(backend: str):
    d, mels, rows = 24, 7, 10
    frames = {"frames": Input(Axis.ENCODER, 2 * mels), "index": Input(Axis.ENCODER, 1, torch.int32)}
    with using(backend):
        encoder = Encoder(d, mels, rows)
        program = record(encoder, frames)
        for windows in (1, 3, 0):
            x = torch.randn(windows * rows, 2 * mels, generator=torch.Generator().manual_seed(windows))
            index = torch.arange(windows * rows, dtype=torch.int32) * 3 % rows
            assert bits_equal(program(frames=x, index=index), encoder(x, index))
        with pytest.raises(KernelError, match="windows of 20 rows, not 18"):
            program(frames=torch.randn(9, 2 * mels), index=torch.zeros(9, dtype=torch.int32))
        with pytest.raises(KernelError, match="row 10 is added of a table of 10"):
            program(frames=x.new_zeros(rows, 2 * mels), index=torch.full((rows,), 10, dtype=torch.int32))


def test_what_does_not_fit_is_named():
    x, vector = torch.randn(6, 8), torch.ones(8)
    for weight, bias in (
        (vector.double(), vector),
        (vector, vector.half()),
        (vector[:7], vector[:7]),
        (vector, vector[:7]),
    ):
        with pytest.raises(KernelError, match="norm"):
            layer_norm_cpu(x, weight, bias, 1e-5)
    group = prepare([as_dense(random_core(4, 8, "fp32", torch.Generator()))], backend="cpu")
    for norm in (LayerNorm(vector[:7], vector[:7], 1e-5), LayerNorm(vector, vector.double(), 1e-5)):
        with pytest.raises(KernelError, match="norm"):
            group(x, norm=norm)
    with pytest.raises(KernelError, match="not both"):
        group(x, norm=RmsNorm(vector, 1e-5), gelu=True)
    with pytest.raises(KernelError, match="gelu"):
        gelu_cpu(x.double())
    for add in (add_rows, add_rows_cpu):
        with pytest.raises(KernelError, match="add_rows"):
            add(x, torch.zeros(3, 7))
        with pytest.raises(KernelError, match="add_rows"):
            add(x, torch.zeros(3, 8), torch.zeros(5, dtype=torch.int32))
    weight = torch.randn(4, 8, 3)
    with pytest.raises(KernelError, match=r"\[4, 8, 2\]"):
        CpuConvolution(weight[:, :, :2], vector[:4], 1, 6)
    with pytest.raises(KernelError, match="multiple of its stride 4"):
        CpuConvolution(weight, vector[:4], 4, 6)
    convolution = CpuConvolution(weight, vector[:4], 2, 6)
    with pytest.raises(KernelError, match="rows of 9"):
        convolution(torch.randn(6, 9))
    with pytest.raises(KernelError, match="windows of 6 rows, not 5"):
        convolution(torch.randn(5, 8))
    with pytest.raises(KernelError, match="fp32"):
        convolution(x.double())


def test_torchs_layer_norm_is_the_same_norm():
    g = torch.Generator().manual_seed(1)
    x, weight, bias = torch.randn(9, 33, generator=g), torch.randn(33, generator=g), torch.randn(33, generator=g)
    torch.testing.assert_close(layer_norm_torch(x, weight, bias, 1e-5), layer_norm_reference(x, weight, bias, 1e-5))
