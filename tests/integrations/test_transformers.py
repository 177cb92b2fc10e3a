"""Slim checkpoints in transformers: the same logits as the dense reconstruction, the same bytes back."""

import copy
import gc
import json
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import cai_runtime
from cai_runtime.integrations.dense import dense_state, slim_modules
from cai_runtime.integrations.embedding import SlimEmbedding
from cai_runtime.integrations.linear import FactorizedLinear, SlimLinear, TiedLinear
from cai_runtime.slim.elastic import ElasticModule, ElasticTable
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.writer import GUARD, CheckpointWriter
from cai_runtime.stock.load import slim_as_transformers

STORES = ["fp32", "bf16", "fp16", "int8", "int4-g32", "int4-g64-zp"]
KINDS = ["dense", "lowrank", "interpolative", "mpo"]


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def assert_close(found, wanted, relative=2e-5):
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= relative * float(wanted.abs().max())


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dense_reconstruction(make_slim, ids, kind, store):
    path = make_slim(kind, store, embedding=store)
    model = load(path)
    packed = store.startswith("int")
    assert isinstance(model.model.embed_tokens, SlimEmbedding) == packed
    assert isinstance(model.model.layers[0].mlp.up_proj, SlimLinear) == (packed or kind != "dense")
    assert_close(logits(model, ids), logits(slim_as_transformers(path), ids))


@pytest.mark.parametrize("head", [("lowrank", "int8"), ("dense", "int4-g32"), ("dense", "bf16"), None])
def test_biases_and_heads(make_slim, ids, head):
    path = make_slim(["interpolative", "dense"], "int8", bias=True, head=head, embedding="int4-g64")
    model = load(path)
    assert isinstance(model.lm_head, SlimLinear) == (head is None or head != ("dense", "bf16"))
    assert_close(logits(model, ids), logits(slim_as_transformers(path), ids))


def test_a_bias_that_the_stock_model_has_not(tmp_path, slim, ids):
    with Checkpoint.open(slim) as checkpoint, CheckpointWriter(tmp_path / "biased", config=checkpoint.config) as writer:
        for name, spec in checkpoint.modules.items():
            module = checkpoint.module(name)
            bias = torch.ones(spec.out_features) if name.endswith("0.mlp.up_proj") else None
            writer.add_module(name, spec, module.cores, module.pivot, bias)
        for name in checkpoint.tensors():
            if name.endswith("norm.weight"):
                writer.add_tensor(name, checkpoint.tensor(name))
        writer.finish()
    model = load(tmp_path / "biased")
    assert torch.equal(model.model.layers[0].mlp.up_proj.bias, torch.ones(56))
    assert model.model.layers[1].mlp.up_proj.bias is None
    assert float((logits(model, ids) - logits(load(slim), ids)).abs().max()) > 1e-3


def test_generate_gives_the_dense_models_tokens(slim, ids):
    model, dense = load(slim), slim_as_transformers(slim)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    wanted = dense.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings), wanted)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_that_of_activations(slim, ids, dtype):
    model, wanted = load(slim, dtype=dtype), logits(slim_as_transformers(slim), ids)
    assert model.dtype == dtype
    up = model.model.layers[0].mlp.up_proj
    assert up.core_0.dtype == torch.int8 and up.core_0_scale.dtype == torch.float32
    found = logits(model, ids)
    assert found.dtype == dtype
    dense = logits(slim_as_transformers(slim, dtype=dtype), ids)
    error, allowed = (float((x.double() - wanted.double()).abs().mean()) for x in (found, dense))
    assert error <= 1.2 * allowed + 1e-5  # weights are not rounded to dtype here: rather below


def test_moving_and_casting_keep_the_store(slim, ids):
    model = load(slim)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    linears = {m: torch.randn(3, m.in_features) for m in slim_modules(model).values() if isinstance(m, SlimLinear)}
    wanted = {module: module(x) for module, x in linears.items()}
    model.to(torch.bfloat16).to("cpu")
    assert logits(model, ids).dtype == torch.bfloat16
    model.to(torch.float32)
    assert logits(model, ids).dtype == torch.float32
    for name, module in slim_modules(model).items():
        if not isinstance(module, TiedLinear):
            assert all(torch.equal(t, before[f"{name}.{part}"]) for part, t in module.stored_tensors())
    assert all(torch.equal(module(x), wanted[module]) for module, x in linears.items())


def test_no_dense_copy_is_held(make_slim, ids):
    path = make_slim(["interpolative", "lowrank", "mpo"], "int8")
    model = load(path)
    with Checkpoint.open(path) as checkpoint:
        stored = {name: (info.shape, info.dtype) for name, info in checkpoint.tensors().items()}
        nbytes = checkpoint.nbytes
    held = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in stored}}
    assert {name: tuple(t.shape) for name, t in held.items()} == {name: shape for name, (shape, _) in stored.items()}
    assert sum(tensor.nbytes for tensor in held.values()) == nbytes
    logits(model, ids)
    gc.collect()
    shapes = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, FactorizedLinear)}
    big = [
        t for t in gc.get_objects() if type(t) is torch.Tensor and tuple(t.shape) in shapes and t.is_floating_point()
    ]
    assert not big


@pytest.mark.parametrize("stores", [("int8", "int8"), ("bf16", "bf16"), ("int4-g64", "fp16")])
def test_save_pretrained_writes_the_same_cores(make_slim, tmp_path, ids, stores):
    path = make_slim(KINDS, stores[0], embedding=stores[1])
    model = load(path)
    logits(model, ids)  # what the kernels prepared must not show
    model.save_pretrained(tmp_path / "saved")
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    config, saved = (json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "saved"))
    assert config["quantization_config"] == saved["quantization_config"]
    assert config["dtype"] == saved["dtype"]
    assert config["transformers_weights"] == saved["transformers_weights"] == GUARD
    Checkpoint.open(tmp_path / "saved").close()
    assert torch.equal(logits(load(tmp_path / "saved"), ids), logits(model, ids))


def test_save_in_shards(slim, tmp_path, ids):
    model = load(slim)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert torch.equal(logits(load(tmp_path), ids), logits(model, ids))


def test_upload_by_save_pretrained_is_refused(slim, tmp_path):
    with pytest.raises(cai_runtime.CaiError, match="push_to_hub"):
        load(slim).save_pretrained(tmp_path / "x", push_to_hub=True)
    assert not (tmp_path / "x").exists()


def test_tied_head_shares_the_embeddings_codes(slim):
    model = load(slim)
    assert isinstance(model.lm_head, TiedLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # What is cast to the weight's dtype on its way into the layer must stay a number.
    assert model.lm_head.weight.detach().dtype == torch.int8 and model.lm_head.weight.dtype == torch.float32
    assert model.to(torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    assert not any(name.startswith("lm_head") for name in dict(model.named_parameters()))


def test_base_model_and_another_head(slim, ids):
    base = AutoModel.from_pretrained(slim)
    assert isinstance(base.layers[0].mlp.up_proj, FactorizedLinear)
    wanted = load(slim).model(ids).last_hidden_state
    assert torch.equal(base(ids).last_hidden_state, wanted)
    classifier = AutoModelForSequenceClassification.from_pretrained(slim, num_labels=3, pad_token_id=1)
    assert classifier(ids).logits.shape == (2, 3)


def test_base_model_without_its_listed_head(make_slim, ids):
    path = make_slim("lowrank", "int8", head=("dense", "int8"))
    assert AutoModel.from_pretrained(path)(ids).last_hidden_state.shape == (2, 9, 32)


def test_state_dict_instead_of_files(slim, ids):
    from transformers import AutoConfig, LlamaForCausalLM

    state = load_file(slim / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(None, config=AutoConfig.from_pretrained(slim), state_dict=state)
    assert torch.equal(logits(model, ids), logits(load(slim), ids))


def test_copies_prepare_for_themselves(slim, ids):
    model = load(slim)
    wanted = logits(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), wanted)
        assert other.lm_head.weight is other.model.embed_tokens.weight
        assert other.lm_head.weight is not model.lm_head.weight
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.core_0.zero_()
        assert not torch.equal(logits(other, ids), wanted)
    assert torch.equal(logits(model, ids), wanted)


def test_dense_state_is_the_reconstruction(slim):
    model = load(slim)
    found = dict(dense_state(model))
    wanted = slim_as_transformers(slim).state_dict()
    wanted.pop("lm_head.weight")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert all(t.dtype == torch.float16 for _, t in dense_state(model, torch.float16))


def test_dequantize(slim, ids, tmp_path):
    model = load(slim).dequantize()
    assert not slim_modules(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model, ids), logits(slim_as_transformers(slim), ids))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and "transformers_weights" not in config
    assert torch.equal(logits(load(tmp_path), ids), logits(model, ids))


def test_rows_do_not_depend_on_their_batch(slim):
    model = load(slim)
    for module in slim_modules(model).values():
        if isinstance(module, SlimLinear):
            x = torch.randn(5, module.in_features)
            assert torch.equal(module(x)[2:3], module(x[2:3]))
            assert module(x[:0]).shape == (0, module.out_features)
            assert torch.equal(module(x.view(1, 5, -1))[0], module(x))


def test_torch_compile_sees_plain_torch(slim, ids):
    for module in slim_modules(load(slim)).values():
        if isinstance(module, SlimLinear):
            x = torch.randn(3, module.in_features)
            compiled = torch.compile(module, backend="eager", fullgraph=True)
            assert_close(compiled(x).detach(), module(x), 1e-5)


@pytest.mark.parametrize("has_second_form", [True, False])
def test_an_elastic_checkpoint_is_its_largest_size(make_slim, tmp_path, ids, has_second_form, caplog):
    source = make_slim(["lowrank", "dense"], "int8")
    grows, both = (f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj"))
    second = ModuleSpec("lowrank", 16, 32, 8, ("int8", "int8"))
    growing = (ElasticModule(grows, 8), *([ElasticModule(both, 4, second)] if has_second_form else []))
    order = (0, 0, 1, 1) if has_second_form else (0, 0)
    with (
        Checkpoint.open(source) as checkpoint,
        CheckpointWriter(tmp_path / "elastic", config=checkpoint.config) as writer,
    ):
        for name, spec in checkpoint.modules.items():
            module = checkpoint.module(name)
            writer.add_module(name, spec, module.cores, module.pivot)
        for name in checkpoint.tensors():
            if name.endswith("norm.weight"):
                writer.add_tensor(name, checkpoint.tensor(name))
        if has_second_form:
            writer.add_second_form(both, second, [torch.randn(shape) for shape in second.core_shapes])
        writer.set_elastic(ElasticTable((0.6, 1.0), growing, 4, order))
        writer.finish()
    transformers.logging.enable_propagation()
    model, info = load(tmp_path / "elastic", output_loading_info=True)
    transformers.logging.disable_propagation()
    assert not any(info.values()) and "UNEXPECTED" not in caplog.text
    assert torch.equal(logits(model, ids), logits(load(source), ids))
    model.save_pretrained(tmp_path / "saved")
    with Checkpoint.open(tmp_path / "saved") as saved, Checkpoint.open(tmp_path / "elastic") as elastic:
        assert saved.modules == elastic.modules
        assert saved.elastic == (None if has_second_form else elastic.elastic)
