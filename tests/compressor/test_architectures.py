"""Tiny random models of many architectures, the whole way: compressed, healed, loaded by transformers. What the compressor
can't do right it refuses, and what it leaves alone it says."""

import json

import pytest
import torch

import cai_runtime  # noqa: F401 - registers the format with transformers
from cai_runtime.compressor import compress, dry_run
from cai_runtime.compressor.stats.block_stack import find_stacks
from cai_runtime.compressor.train.logit_slices import states_of
from cai_runtime.errors import TensorMissingError, UnsupportedModelError
from cai_runtime.integrations.stand_in import is_linear
from cai_runtime.slim.export import export_dense
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.stock.load import auto_class, dense_reference, slim_as_transformers

IDS = torch.randint(6, 62, (2, 24), generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": 62, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
NO_KV = {"num_key_value_heads": None}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, **EXPERTS,
}  # fmt: skip
SSM = {"head_dim": 8, "n_groups": 1, "chunk_size": 16, **NO_KV}
WINDOW = {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
# Configuration class and what it has beside `SIZES` (None: not that one), by what is particular about it.
MODELS = {
    "biases": ("Qwen2Config", {}),
    "fused qkv, gate and up": ("Phi3Config", {}),
    "fused experts": ("Qwen3MoeConfig", {"head_dim": 8, "num_experts": 4, **EXPERTS}),
    "scaled embedding, bent logits": (
        "Gemma2Config", {**WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 0.5, "tie_word_embeddings": True},
    ),
    "scaled logits": ("GraniteConfig", {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "a subclass of Linear": ("FalconConfig", {"alibi": False, "intermediate_size": None, **NO_KV}),
    "blocks that return tuples": ("BloomConfig", {"n_layer": 2, "n_head": 4, "intermediate_size": None, **NO_KV}),
    "weights that are read": ("MambaConfig", {"state_size": 8, "intermediate_size": None, **NO_KV}),
    "casts to a weight's dtype": (
        "GlmMoeDsaConfig", {**LATENT, "mlp_layer_types": ["dense", "sparse"], "index_n_heads": 2, "index_head_dim": 8,
                            "index_topk": 16},
    ),
    "renamed tensors": (
        "NemotronHConfig", {**SSM, "layers_block_type": ["mamba", "attention"], "num_key_value_heads": 2,
                            "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "use_mamba_kernels": False},
    ),
    "scalars": ("ApertusConfig", {}),
    "blocks that share layers": (
        "ZambaConfig", {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
                        "mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2, "use_mamba_kernels": False,
                        "num_key_value_heads": 4, "attention_head_dim": 16},
    ),
    "a vision tower": (
        "LlavaConfig", {"text_config": {**SIZES, "model_type": "llama"}, "image_token_index": 5,
                        "vision_config": {**VISION, "model_type": "clip_vision_model"}},
    ),
}  # fmt: skip
READ = {"weights that are read"}
LEFT = {
    "fused experts": 0.5,
    "blocks that share layers": 0.2,
    "casts to a weight's dtype": 0.2,
    "a vision tower": 0.2,
}  # a share that is at least left


@pytest.fixture
def make(tmp_path, add_tokenizer, monkeypatch):
    """Saves a random model of a configuration class; its directory."""
    from transformers import PreTrainedTokenizerFast

    # transformers has tokenizer classes of its own for some architectures, which don't read the tests' one.
    monkeypatch.setattr("cai_runtime.compressor.run._tokenizer", PreTrainedTokenizerFast.from_pretrained)

    def model(config_class, options, name="src"):
        import transformers

        found = getattr(transformers, config_class, None)
        if found is None:
            pytest.skip(f"transformers {transformers.__version__} has no {config_class}")
        sizes = {} if "text_config" in options else SIZES
        config = found(
            **{key: value for key, value in {**sizes, **options}.items() if (sizes | options)[key] is not None}
        )
        torch.manual_seed(0)
        made = auto_class(config).from_config(config)
        with torch.no_grad():
            for key, parameter in made.named_parameters():
                if parameter.ndim > 1 or key.endswith("bias"):
                    parameter.normal_(0, 0.3)
        made.save_pretrained(tmp_path / name)
        add_tokenizer(tmp_path / name)
        return tmp_path / name

    return model


def run(src, dst, text_file, **options):
    settings = {
        "calibration": text_file, "samples": 4, "sequence_length": 16, "rank_multiple": 1, "refine_epochs": 0,
        "heal_tokens": 0, "evaluate": False, "progress": False,
    }  # fmt: skip
    return compress(src, dst, **{**settings, **options})


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def distance(a, b):
    return float((a - b).norm() / a.norm())


def loaded(path):
    """As users load it."""
    from transformers import AutoConfig

    return auto_class(AutoConfig.from_pretrained(path)).from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("what", MODELS)
def test_the_whole_way(make, text_file, tmp_path, what):
    src = make(*MODELS[what])
    report = run(src, tmp_path / "slim", text_file, keep=0.9, refine_epochs=1, heal_tokens=64)
    wanted = logits(slim_as_transformers(tmp_path / "slim"))
    assert distance(wanted, logits(loaded(tmp_path / "slim"))) < 1e-4
    assert all(module.calibrated for module in report.modules)
    assert bool(report.read) == (what in READ)
    assert sum(report.left.values()) >= LEFT.get(what, 0) * report.total_dense_parameters
    assert ("left as they are" in report.summary()) == bool(report.left)
    export_dense(tmp_path / "slim", tmp_path / "dense", dtype="fp32")
    assert distance(wanted, logits(loaded(tmp_path / "dense"))) < 1e-4

    stores = {"kind": "dense", "store": "fp32", "embedding_store": "fp32"}
    run(src, tmp_path / "same", text_file, keep=1.0, curvature=False, samples=1, **stores)
    wanted = logits(dense_reference(src))
    torch.testing.assert_close(logits(slim_as_transformers(tmp_path / "same")), wanted)
    torch.testing.assert_close(logits(loaded(tmp_path / "same")), wanted)
    with Checkpoint.open(src) as before, Checkpoint.open(tmp_path / "same") as after:
        assert before.tensors().keys() == after.tensors().keys()


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, **dict.fromkeys(SIZES), "vocab_size": 62}, "Conv1D"),
        # Later layers take the keys and values of earlier ones.
        (
            "Gemma4TextConfig",
            {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 62, **WINDOW,
             "hidden_size_per_layer_input": 8, "global_head_dim": 8, "layer_types": WINDOW["layer_types"] * 2},
            "more than hidden states",
        ),
        ("BertConfig", {"is_decoder": False, "architectures": ["BertForMaskedLM"], **NO_KV}, None),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_and_nothing_is_left(make, text_file, tmp_path, config_class, options, message):
    src = make(config_class, options)
    if message is None:  # a model type for which there is no class that predicts text
        config = json.loads((src / "config.json").read_text()) | {"model_type": "vit"}
        (src / "config.json").write_text(json.dumps(config))
        message = "'vit'"
    with pytest.raises(UnsupportedModelError, match=message):
        run(src, tmp_path / "slim", text_file)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_tensor_that_is_missing_is_not_drawn_at_random(make, text_file, tmp_path):
    from safetensors.torch import load_file, save_file

    src = make("LlamaConfig", {})
    tensors = load_file(src / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TensorMissingError) as raised:
        run(src, tmp_path / "slim", text_file)
    assert raised.value.tensor == name
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_checkpoint_without_the_models_prefix(make, text_file, tmp_path):
    """As that of a base model, or of Bloom on the hub."""
    from safetensors.torch import load_file, save_file

    src = make("LlamaConfig", {})
    tensors = load_file(src / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, src / "model.safetensors", metadata={"format": "pt"})
    run(src, tmp_path / "slim", text_file, keep=0.9)
    with Checkpoint.open(tmp_path / "slim") as slim:
        assert "layers.0.mlp.up_proj" in slim.modules
    wanted = logits(slim_as_transformers(tmp_path / "slim"))
    assert distance(wanted, logits(loaded(tmp_path / "slim"))) < 1e-4


def test_a_dry_run_says_what_stays(make, text_file, tmp_path):
    src = make(*MODELS["fused experts"])
    plan, _ = dry_run(src, tmp_path / "slim", calibration=text_file, rank_multiple=1, sequence_length=64)
    reason = "in model.layers.*.mlp.experts.*, which transformers fuses with others while it loads"
    assert plan.left.parameters[reason] == 2 * 4 * 3 * 24 * 32
    assert "left as they are" in plan.summary() and "64.5% of the model" in plan.summary()


def test_a_report_serves_as_plan_for_layers_that_stay_dense(make, text_file, tmp_path):
    src = make(*MODELS["weights that are read"])
    run(src, tmp_path / "slim", text_file, keep=0.8)
    again = run(src, tmp_path / "again", text_file, plan=tmp_path / "slim/slim_report.json")
    first = json.loads((tmp_path / "slim/slim_report.json").read_text())
    assert [(m.name, m.rank) for m in again.modules] == [(m["name"], m["rank"]) for m in first["modules"]]
    assert again.read == first["read"] != []


def test_logits_of_few_states_are_the_models(make):
    model = dense_reference(make(*MODELS["scaled embedding, bent logits"]))
    with torch.inference_mode():
        states = states_of(model, {"input_ids": IDS})
        found = states.logits(states.hidden[1, 3:7])
    torch.testing.assert_close(found, logits(model)[1, 3:7])
    assert found.abs().max() <= 0.5 and (model.lm_head(states.hidden).abs().max() > 0.5)


def test_a_subclass_is_linear_if_it_does_nothing_else():
    class Same(torch.nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Chooses(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).topk(2)

    assert is_linear(Same(5, 3)) and is_linear(torch.nn.Linear(5, 3)) and not is_linear(torch.nn.Bilinear(5, 5, 3))
    assert not is_linear(Scaled(5, 3)) and not is_linear(Chooses(5, 3))


def test_a_list_of_linear_layers_is_no_stack(make):
    model = dense_reference(make("LlamaConfig", {}))
    model.model.projections = torch.nn.ModuleList([torch.nn.Linear(3, 3)])
    assert [stack.name for stack in find_stacks(model)] == ["model.layers"]
