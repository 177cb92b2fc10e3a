"""The ahead-of-time check itself: one kernel per vendor here; CI runs all of `python -m cai_runtime.kernels.triton.aot`."""

from __future__ import annotations

import dataclasses
import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)

from cai_runtime.kernels.triton import aot


def case(name: str) -> aot.Case:
    return next(c for c in aot.cases() if c.name == name)


def test_decode_kernels_compile_without_spills():
    for target in ("sm_90", "gfx942"):
        outcome = aot.compile_case(case("products decode x3 bfloat16 int8"), target)
        assert outcome.problems == [] and outcome.spilled == 0 and outcome.registers > 0 and outcome.shared > 0


@pytest.mark.parametrize("name", ["sample", "row totals"])
def test_the_sampler_fuses_no_product_with_a_sum(monkeypatch: pytest.MonkeyPatch, name: str):
    """Fused, weights would differ from the CPU's in their last bits."""
    assert aot.compile_case(case(name), "sm_90").problems == []
    compile_kernel = aot.triton.compile
    monkeypatch.setattr(
        aot.triton,
        "compile",
        lambda source, target, options: compile_kernel(
            source, target=target, options=options | {"enable_fp_fusion": True}
        ),
    )
    assert any("fused" in problem for problem in aot.compile_case(case(name), "sm_90").problems)


def test_attention_compiles_for_blackwell():
    assert aot.compile_case(case("attention decode bfloat16 D=128"), "sm_100").problems == []


def test_products_that_would_break_batch_invariance_are_found():
    """A tile of 64 rows makes Hopper use wgmma."""
    good = case("products prefill x1 bfloat16 bf16")
    bad = dataclasses.replace(good, constants=good.constants | {"BLOCK_M": 64})
    outcome = aot.compile_case(bad, "sm_90")
    assert any("wgmma" in problem for problem in outcome.problems)


@pytest.mark.parametrize("name", ["int4/64", "int4/128 norm"])
def test_int4_decode_reads_weights_in_wide_loads(name: str):
    good = case(f"products decode x3 bfloat16 {name}")
    assert aot.compile_case(good, "sm_100").problems == []
    types = {key: kind.rstrip("!") if key.startswith("w") else kind for key, kind in good.types.items()}  # not aligned
    outcome = aot.compile_case(dataclasses.replace(good, types=types), "sm_100")
    assert any("narrower" in problem for problem in outcome.problems)


def test_spills_of_decode_kernels_are_found():
    good = case("attention decode float32 D=64")
    bad = dataclasses.replace(good, num_warps=1)
    assert any("spills" in problem for problem in aot.compile_case(bad, "sm_90").problems)


def test_products_name_the_type_of_their_sums(monkeypatch: pytest.MonkeyPatch):
    """Triton 3.6 takes it for float32 where nothing is said, and refuses sums of integers."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    dot, seen = TritonSemantic.dot, []

    def strict(self, lhs, rhs, acc, input_precision, max_num_imprecise_acc, out_dtype):
        seen.append((acc.type.element_ty, out_dtype or tl.float32))
        return dot(self, lhs, rhs, acc, input_precision, max_num_imprecise_acc, out_dtype)

    monkeypatch.setattr(TritonSemantic, "dot", strict)
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    aot.compile_case(case("products decode x1 bfloat16 int8 w8a8"), "sm_90")
    assert (tl.int32, tl.int32) in seen and all(acc == stated for acc, stated in seen)


def with_byte_zero_points(good: aot.Case) -> aot.Case:
    """As Triton 3.6 to 3.8 lay it out, 8 columns to a lane."""
    return dataclasses.replace(good, types=good.types | {"zero0": "*u8!"})


def test_dots_shorter_than_their_layout_are_found():
    """A group of 32 has two dots over 16 columns."""
    good = case("products decode x1 bfloat16 int4/32z")
    outcome = aot.compile_case(good, "sm_90")
    assert outcome.problems == [] and outcome.orders == {("bf16", 4)}
    bad = aot.compile_case(with_byte_zero_points(good), "sm_90")
    assert any("over 16 columns of bf16 is laid out for 32" in problem for problem in bad.problems)


def test_decode_and_prefill_that_add_in_another_order_are_found():
    decode, prefill = (case(f"products {phase} x1 bfloat16 int4/64z") for phase in ("decode", "prefill"))
    outcomes = [(c, aot.compile_case(c, "sm_90")) for c in (decode, prefill, with_byte_zero_points(prefill))]
    orders = aot.Orders()
    for c, outcome in outcomes:
        orders.check(c, "sm_90", outcome)
    good, also_good, bad = (outcome for _, outcome in outcomes)
    assert good.problems == also_good.problems == []
    assert any(f"another order than {decode.name}" in problem for problem in bad.problems)


def test_every_product_is_in_a_check_of_orders():
    """But those whose sums are exact, in fused multiply-adds, or of a norm that no launch has."""
    alone = [c.name for c in aot.cases() if c.products and not c.same_bits and not c.int8 and not c.fp32]
    assert all(name.endswith((" norm", " factor")) and " int" in name for name in alone), alone
    groups: dict[str, set[bool]] = {}
    for c in aot.cases():
        if c.same_bits and not c.fp32:
            groups.setdefault(c.same_bits, set()).add(c.decode)
    assert all(phases == {True, False} for phases in groups.values()), groups


def test_dots_are_read_from_the_gpu_dialect():
    """Those of the matrix unit; the columns are the first operand's."""
    layout = "#ttg.dot_op<{opIdx = %d, parent = #mma, kWidth = 8}>"
    operands = f"tensor<32x16xbf16, {layout % 0}> * tensor<16x64xbf16, {layout % 1}>"
    line = f"%1 = tt.dot %a, %b, %c : {operands} -> tensor<32x64xf32, #mma>"
    fma = "%1 = tt.dot %a, %b, %c : tensor<32x8xf32, #ttg.dot_op<{opIdx = 0, parent = #blocked}>> * tensor<8x8xf32>"
    assert aot.dots(f"{line}\n{fma}\n") == {aot.Dot(16, "bf16", 8)}
    group = "%1 = ttng.warp_group_dot %a, %b, %c {isAsync = true} : "
    shared = f"{group}!ttg.memdesc<128x32xf16, #shared1, #smem> * !ttg.memdesc<32x64xf16, #shared2, #smem> -> "
    registers = f"{group}tensor<128x64xf16, {layout % 0}> * !ttg.memdesc<64x16xf16, #shared, #smem> -> "
    assert aot.dots(f"{shared}\n{registers}\n") == {aot.Dot(32, "f16", 2), aot.Dot(64, "f16", 8)}
    assert not aot.Dot(16, "bf16", 8).fits and aot.Dot(16, "bf16", 4).fits


def test_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        aot.main(["--targets", "sm_7"])
    assert "unknown target sm_7" in capsys.readouterr().err
