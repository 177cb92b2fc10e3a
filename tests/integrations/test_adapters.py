"""What PEFT does to a linear's weight, on slim modules: the same as on the dense copy, or a typed error."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM

from cai_runtime.errors import CaiError, KernelError, UnsupportedModelError
from cai_runtime.integrations.dense import slim_modules

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "o_proj", "gate_proj"]
# Where the defaults are for larger layers than those of the tests.
SIZES = {
    "ADALORA": {"total_step": 10}, "C3A": {"block_size": 8}, "MISS": {"r": 8}, "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2}, "VBLORA": {"vector_length": 8}, "WAVEFT": {"n_frequency": 64}, "IA3": {"feedforward_modules": []},
}  # fmt: skip
NO_LINEAR = ("LN_TUNING", "TRAINABLE_TOKENS", "SHADOW", "ADAPTION_PROMPT")  # those don't change a linear layer
# Kinds that take the layers over by themselves and refuse ours with an error of their own.
OWN_ERROR = ("GLORA",)


def tuners():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        fields = inspect.signature(config).parameters
        if "target_modules" in fields and kind.value not in NO_LINEAR:
            yield pytest.param(config, {**SIZES.get(kind.value, {}), "target_modules": TARGETS}, id=kind.value)
    for change in ({"use_dora": True}, {"use_rslora": True}):
        yield pytest.param(peft.LoraConfig, {"target_modules": TARGETS, **change}, id=next(iter(change)))


def load(path):
    return AutoModelForCausalLM.from_pretrained(path)


def adapted(model, config):
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("kind", ["dense", "interpolative"])
@pytest.mark.parametrize(("config", "options"), list(tuners()))
def test_no_tuner_merges_in_silence(paths, ids, config, options, kind):
    slim = paths[kind]
    try:
        dense = adapted(load(slim).dequantize(), config(**options))
        wanted = logits(dense, ids)
        dense.merge_and_unload()
    except (ImportError, ValueError, NotImplementedError) as e:
        pytest.skip(f"PEFT can't merge it into a stock model either: {e}")
    expected = ValueError if config.__name__.removesuffix("Config").upper() in OWN_ERROR else KernelError
    with pytest.raises(expected):
        found = adapted(load(slim), config(**options))
        torch.testing.assert_close(logits(found, ids), wanted, rtol=1e-3, atol=1e-3)  # trains on the true weight
        found.merge_and_unload()


STARTS = ["pissa", "pissa_niter_4", "olora", "loftq", "orthogonal", "gaussian", "eva", "mica", "corda", "lora_ga"]
CHANGE_THE_WEIGHT = ("pissa", "olora", "loftq", "corda", "lora_ga")


@pytest.mark.parametrize("kind", ["dense", "interpolative"])
@pytest.mark.parametrize("start", STARTS)
def test_a_start_is_as_on_the_dense_copy_or_refused(paths, ids, start, kind):
    from peft.tuners.lora.config import CordaConfig

    def started(model):
        torch.manual_seed(0)
        own = {"lora_ga": {"lora_ga_config": peft.LoraGAConfig()}, "corda": {"corda_config": CordaConfig()},
               "loftq": {"loftq_config": peft.LoftQConfig()}}.get(start, {})  # fmt: skip
        config = peft.LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=start, **own)
        if start == "corda":
            from peft.tuners.lora.corda import preprocess_corda

            preprocess_corda(model, config, run_model=lambda: logits(model, ids[:1]))
        elif start == "lora_ga":
            from peft.tuners.lora.loraga import preprocess_loraga

            preprocess_loraga(model, config, lambda: model(ids, labels=ids).loss.backward())
        return logits(peft.get_peft_model(model, config), ids)

    try:
        wanted = started(load(paths[kind]).dequantize())
    except (ImportError, ValueError, AttributeError, TypeError) as e:
        pytest.skip(f"PEFT can't start so here: {e}")
    if start.startswith(CHANGE_THE_WEIGHT):
        with pytest.raises(KernelError):
            started(load(paths[kind]))
    else:
        torch.testing.assert_close(started(load(paths[kind])), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("store", ["int8", "int4-g32-zp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_is_the_dense_weight(make_slim, store, dtype):
    model = AutoModelForCausalLM.from_pretrained(make_slim(["dense", "lowrank"], store), dtype=dtype)
    modules = slim_modules(model)
    assert "model.embed_tokens" in modules and "lm_head" in modules
    for name, module in modules.items():
        weight, wanted = module.weight, module.dense_weight()
        assert isinstance(weight, torch.nn.Parameter) and weight.dtype == dtype, name
        assert tuple(weight.shape) == tuple(wanted.shape)
        assert torch.equal(weight, wanted) and torch.equal(weight.data, wanted) and torch.equal(weight.detach(), wanted)
        assert torch.equal(weight.to(torch.float64), wanted.to(torch.float64))
        assert torch.equal(torch.stack([weight, weight])[1], wanted)
        assert float(torch.linalg.norm(weight)) == float(torch.linalg.norm(wanted))


WRITES = {
    "data": lambda m: setattr(m.weight, "data", torch.zeros_like(m.weight)),
    "data +=": lambda m: m.weight.data.add_(1),
    "view": lambda m: m.weight.view(-1).add_(1),
    "row": lambda m: m.weight[0].zero_(),
    "transposed": lambda m: m.weight.T.mul_(2),
    "item": lambda m: m.weight.data.__setitem__(0, 1.0),
    "out": lambda m: torch.mul(m.dense_weight(), 2, out=m.weight),
    "foreach": lambda m: torch._foreach_add_([m.weight], 1.0),
    "assigned": lambda m: setattr(m, "weight", torch.nn.Parameter(m.dense_weight())),
    "clone": lambda m: m.weight.clone().add_(1),
    "trained": lambda m: m.weight.requires_grad_(True),
}


@pytest.mark.parametrize("kind", ["dense", "interpolative"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_weight_is_not_written_to(paths, kind, write):
    module = load(paths[kind]).model.layers[0].self_attn.q_proj
    before = module.dense_weight()
    with pytest.raises(KernelError):
        write(module)
    assert torch.equal(module.dense_weight(), before)


def test_codes_are_not_written_to(slim):
    for parameter in load(slim).parameters():
        if not parameter.is_floating_point():
            with pytest.raises(KernelError, match="can't be trained"):
                parameter.requires_grad = True
            with pytest.raises(KernelError, match="can't be changed"):
                parameter.data = torch.zeros_like(parameter)
            with pytest.raises(KernelError, match="can't be changed"):
                parameter.data.zero_()


def test_ties_outlive_moves_and_tying_again(slim, ids):
    model = load(slim)
    wanted = logits(model, ids)
    model.tie_weights()
    model.to(torch.float32).lm_head.weight = model.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
    assert torch.equal(logits(model, ids), wanted)
    with pytest.raises(KernelError):
        model.lm_head.weight = load(slim).model.layers[0].self_attn.q_proj.weight


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_packed_modules_to_save_are_refused(slim, name):
    with pytest.raises(CaiError, match=r"can't be trained.*modules_to_save"):
        peft.get_peft_model(load(slim), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[name]))


def test_a_float_embedding_is_resized_and_not_saved_as_slim(make_slim, ids, tmp_path):
    model = load(make_slim("lowrank", "int8", embedding="bf16"))
    wanted = logits(model, ids)
    model.resize_token_embeddings(70)
    assert torch.equal(logits(model, ids)[..., :62], wanted)
    with pytest.raises(CaiError, match=r"is \[70, 32\] now.*dequantize"):
        model.save_pretrained(tmp_path / "saved")


def test_packed_embeddings_are_not_resized(slim, ids):
    model = load(slim)
    for change in ((70,), (None, 8)):
        with pytest.raises(UnsupportedModelError, match=r"model\.embed_tokens.*dequantize"):
            model.resize_token_embeddings(*change)
    assert model.resize_token_embeddings(62) is model.get_input_embeddings()
    wanted = logits(model, ids)
    dense = model.dequantize()
    dense.resize_token_embeddings(70)
    torch.testing.assert_close(logits(dense, ids)[..., :62], wanted, rtol=1e-3, atol=1e-4)
