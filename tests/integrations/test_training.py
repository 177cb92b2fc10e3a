"""Gradients through slim modules, adapters on them, and cores that are trained themselves."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import cai_runtime
from cai_runtime.integrations.dense import slim_modules
from cai_runtime.integrations.guarded import ReadOnlyWeight
from cai_runtime.integrations.linear import SlimLinear
from cai_runtime.stock.load import slim_as_transformers

KINDS = ["interpolative", "lowrank", "mpo", "dense"]


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


def linears(model):
    return [m for m in slim_modules(model).values() if isinstance(m, SlimLinear)]


@pytest.mark.parametrize("store", ["fp32", "int8", "int4-g32-zp"])
def test_gradient_of_the_input_is_that_of_the_dense_weight(make_slim, store):
    model = load(make_slim(KINDS, store, bias=True)).requires_grad_(False)
    for module in linears(model.model):  # the head has no bias
        module.bias.requires_grad_(True)
        x = torch.randn(2, 3, module.in_features, requires_grad=True)
        y = module(x)
        with torch.no_grad():
            assert torch.equal(y, module(x))  # the same kernels, with a gradient or without
        out = torch.randn_like(y)
        gradients = torch.autograd.grad(y, (x, module.bias), out)
        torch.testing.assert_close(gradients[0], out @ module.dense_weight(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients[1], out.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_gradcheck_in_float64(slim):
    for module in linears(load(slim)):
        x = torch.randn(2, module.in_features, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(module, x)


def test_gradients_of_a_whole_model(slim, ids):
    model, dense = load(slim), slim_as_transformers(slim)
    vectors = torch.randn(2, 9, 32)
    found, wanted = (v.clone().requires_grad_() for v in (vectors, vectors))
    for start, m in ((found, model), (wanted, dense)):
        m(inputs_embeds=start, labels=ids, use_cache=False).loss.backward()
    assert float((found.grad - wanted.grad).norm()) < 1e-3 * float(wanted.grad.norm())


@pytest.mark.parametrize("kind", ["lowrank", "interpolative", "mpo"])
def test_float_cores_can_be_trained_and_the_kernels_see_it(make_slim, ids, kind):
    model = load(make_slim(kind, "fp32"))
    with torch.no_grad():
        model(ids)  # packed now
    cores = [p for name, p in model.named_parameters() if "core_" in name]
    assert len(cores) >= 2 * 7 * 2
    for p in cores:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(cores, lr=3e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        assert all(p.grad is not None for p in cores)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        now = float(model(ids, labels=ids, use_cache=False).loss)
    assert now < losses[-1] < losses[0]
    cores[0].requires_grad_(False)


def lora(model, **options):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"], "lora_dropout": 0.0}
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings | options))


@pytest.mark.filterwarnings("error:Unsupported layer type")
@pytest.mark.parametrize("store", ["bf16", "int8", "int4-g32"])
def test_lora_trains_as_on_the_dense_model(make_slim, ids, store):
    path = make_slim(KINDS, store)
    found, wanted = lora(load(path)), lora(slim_as_transformers(path))
    for model in (found, wanted):
        model(ids, labels=ids, use_cache=False).loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (found, wanted)]
    assert gradients[0].keys() == gradients[1].keys() and all("lora_" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert float((gradient - gradients[1][name]).norm()) <= 1e-3 * float(gradients[1][name].norm()), name
    assert any(float(g.abs().max()) > 0 for g in gradients[0].values())

    optimizer = torch.optim.AdamW([p for p in found.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = found(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_gradient_checkpointing(slim, ids):
    gradients = []
    for checkpointing in (False, True):
        model = lora(load(slim))
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_adapters_have_the_activations_dtype(slim, ids):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
    model = peft.get_peft_model(load(slim, dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert model(ids).logits.dtype == torch.bfloat16


def test_an_adapter_is_saved_and_loaded(slim, ids, tmp_path):
    peft = pytest.importorskip("peft")
    model = lora(load(slim), init_lora_weights=False).eval()
    with torch.no_grad():
        wanted = model(ids).logits
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(load(slim), tmp_path).eval()
        assert torch.equal(again(ids).logits, wanted)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, load(slim)(ids).logits)
        assert not torch.equal(wanted, load(slim)(ids).logits)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_never_merged_in_silence(make_slim, kind, safe_merge):
    model = lora(load(make_slim(kind, "int8")), init_lora_weights=False)
    with pytest.raises(cai_runtime.CaiError, match="can't be changed in place"):
        model.merge_and_unload(safe_merge=safe_merge)


def test_an_adapter_merges_into_the_dense_copy(slim, ids):
    model = lora(load(slim), init_lora_weights=False).eval()
    wanted = model(ids).logits
    state = {n: p for n, p in model.state_dict().items() if "lora_" in n}
    dense = lora(load(slim).dequantize(), init_lora_weights=False).eval()
    dense.load_state_dict(state, strict=False)
    torch.testing.assert_close(dense.merge_and_unload()(ids).logits, wanted, rtol=1e-3, atol=1e-4)


def test_a_float_dense_module_takes_an_adapter_up(make_slim, ids):
    model = lora(load(make_slim("dense", "fp32")), init_lora_weights=False).eval()
    wanted = model(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, wanted, rtol=1e-3, atol=1e-4)


def test_weight_can_be_looked_at(slim):
    for module in linears(load(slim)):
        if module.spec.kind == "dense":
            continue
        weight = module.weight
        assert isinstance(weight, ReadOnlyWeight) and tuple(weight.shape) == (module.out_features, module.in_features)
        x = torch.randn(2, module.in_features)
        assert type(x @ weight.T) is torch.Tensor
        torch.testing.assert_close(x @ weight.T, module(x), rtol=1e-4, atol=1e-5)
        for change in (lambda w: w.add_(1), lambda w: w.data.mul_(2), lambda w: w.clone().__setitem__(0, 1.0)):
            with pytest.raises(cai_runtime.CaiError):
                change(weight)
