"""GGUF to Hugging Face layout, on tiny random models and on SmolLM2, with transformers as the judge."""

from __future__ import annotations

import json
import math
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cai_runtime.convert.gguf import gguf_to_hf
from cai_runtime.convert.gguf_config import llama3_divisors, llama3_scaling
from cai_runtime.convert.sources import fetch_file
from cai_runtime.errors import ConversionError

TYPES = gguf.GGMLQuantizationType
IDS = torch.arange(0, 120).reshape(2, 60) * 7 % 300


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits.float()


def load(path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 32},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "tie_word_embeddings": False, "num_key_value_heads": 1},
        {"model_type": "qwen3", "head_dim": 32},
        {"model_type": "qwen3", "attention_bias": True, "tie_word_embeddings": False},
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()) or "plain",
)
def test_fp32_model_comes_back_exactly(tiny_llama, write_gguf, tmp_path, options):
    model = tiny_llama(**options)
    found = load(gguf_to_hf(write_gguf(model), tmp_path / "out"))
    assert found.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert found.config.rms_norm_eps == model.config.rms_norm_eps
    assert found.config.dtype == torch.float32
    for (name, want), (found_name, got) in zip(model.state_dict().items(), found.state_dict().items(), strict=True):
        assert name == found_name
        assert torch.equal(want, got), name
    assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize(
    "kind", [TYPES.Q4_0, TYPES.Q5_0, TYPES.Q8_0, TYPES.F16, TYPES.BF16], ids=lambda kind: kind.name
)
def test_every_tensor_type_equals_transformers_own_loading(tiny_llama, write_gguf, tmp_path, kind):
    path = write_gguf(tiny_llama(tie_word_embeddings=False), kind)
    out = gguf_to_hf(path, tmp_path / "out")
    want = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    got = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert torch.allclose(logits(got), logits(want), atol=1e-5)
    expected = {TYPES.F16: torch.float16, TYPES.BF16: torch.bfloat16}.get(kind, torch.float32)
    stored = load_file(out / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored if tensor.ndim > 1} == {expected}
    assert {tensor.dtype for tensor in stored if tensor.ndim == 1} == {torch.float32}, "these are not exact in 16 bits"


def test_vectors_that_are_exact_take_the_matrices_dtype(tiny_llama, write_gguf, tmp_path):
    model = tiny_llama().bfloat16().float()
    out = gguf_to_hf(write_gguf(model, TYPES.BF16), tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, tensor in stored.items():
        assert torch.equal(tensor.float(), model.state_dict()[name]), name


def test_quantized_values_are_those_of_the_blocks(tiny_llama, write_gguf, tmp_path):
    model = tiny_llama()
    out = gguf_to_hf(write_gguf(model, TYPES.Q4_0), tmp_path / "out")
    weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    want = gguf.quants.dequantize(gguf.quants.quantize(weight, TYPES.Q4_0), TYPES.Q4_0)
    got = load_file(out / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_can_be_chosen(tiny_llama, write_gguf, tmp_path, dtype):
    model = tiny_llama()
    out = gguf_to_hf(write_gguf(model), tmp_path / "out", dtype=dtype)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    stored = load_file(out / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(tensor, model.state_dict()[name].to(getattr(torch, dtype))), name


@pytest.mark.parametrize(
    ("rope", "metadata"),
    [
        (
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)],
        ),
        (
            {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32},
            [
                ("add_rope_scaling_type", gguf.RopeScalingType.YARN),
                ("add_rope_scaling_factor", 8.0),
                ("add_rope_scaling_orig_ctx_len", 32),
            ],
        ),
    ],
    ids=["linear", "yarn"],
)
def test_rope_scaling_from_metadata(tiny_llama, write_gguf, tmp_path, rope, metadata):
    model = tiny_llama(rope_parameters=rope)
    path = write_gguf(model, metadata=lambda writer: [getattr(writer, name)(value) for name, value in metadata])
    found = load(gguf_to_hf(path, tmp_path / "out"))
    assert found.config.rope_parameters["rope_type"] == rope["rope_type"]
    assert torch.equal(logits(found), logits(model))
    assert not torch.allclose(logits(tiny_llama()), logits(model), atol=1e-2), "the scaling should matter here"


@pytest.mark.parametrize(("low", "high", "original"), [(1.0, 4.0, 8192), (2.0, 16.0, 1024), (1.0, 8.0, 300)])
def test_llama3_rope_from_its_divisors(tiny_llama, write_gguf, tmp_path, low, high, original):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    model = tiny_llama(rope_parameters=rope, head_dim=64)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    path = write_gguf(model, tensors={"rope_freqs.weight": (plain / scaled).numpy().astype(np.float32)})
    found = load(gguf_to_hf(path, tmp_path / "out"))
    assert found.config.rope_parameters["rope_type"] == "llama3"
    assert torch.allclose(logits(found), logits(model), atol=1e-3)


def test_divisors_that_no_llama3_rule_gives_are_refused():
    divisors = llama3_divisors(10000.0, 64, 8.0, 1.0, 4.0, 8192.0)
    found = llama3_scaling(divisors, 10000.0, 64)
    assert found is not None
    assert found["original_max_position_embeddings"] == 8192
    assert llama3_scaling(divisors[::-1].copy(), 10000.0, 64) is None
    assert llama3_scaling(np.ones(32), 10000.0, 64) == {"rope_type": "default"}


def test_yarn_attention_factor_includes_yarns_own(tiny_llama, write_gguf, tmp_path):
    def metadata(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_attn_factors(2.0)

    config = json.loads(
        (gguf_to_hf(write_gguf(tiny_llama(), metadata=metadata), tmp_path / "o") / "config.json").read_text()
    )
    assert config["rope_parameters"]["attention_factor"] == pytest.approx(2.0 * (0.1 * math.log(4.0) + 1.0))


def test_tokenizer_template_and_special_tokens(tiny_llama, write_gguf, tmp_path):
    out = gguf_to_hf(write_gguf(tiny_llama()), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == 256 + 10 + 3, "the vocabulary's unused end are no tokens"
    assert tokenizer.decode([268, 269, 299]) == "<think>"
    assert tokenizer.tokenize("hello 12 the<think>") == ["hello", "Ġ", "1", "2", "Ġthe", "<think>"]
    for text in ["hello wörld\n\t 1234", "<s>x</s>", " 你好 ½½ "]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer("<s>x<think></s>").input_ids, skip_special_tokens=True) == "x<think>"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "<s>hello</s>"
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def test_every_end_of_turn_of_the_metadata_ends_a_text(tiny_llama, write_gguf, tmp_path):
    def metadata(writer):
        writer.add_eot_token_id(10)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 11)

    out = gguf_to_hf(write_gguf(tiny_llama(), metadata=metadata), tmp_path / "out")
    eos = AutoTokenizer.from_pretrained(out).eos_token_id
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [eos, 10, 11]
    with pytest.raises(ConversionError, match="400 is said to end a text"):
        gguf_to_hf(write_gguf(tiny_llama(), metadata=lambda writer: writer.add_eot_token_id(400)), tmp_path / "bad")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_ends_a_text_where_its_own_configuration_does(tiny_llama, write_gguf, tmp_path, family):
    """The metadata names the end of a turn alone."""
    path = write_gguf(tiny_llama(model_type=family), control=("<|endoftext|>", "<|im_end|>"))
    out = gguf_to_hf(path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert tokenizer.eos_token == "<|im_end|>"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == ends
    config = json.loads((out / "config.json").read_text())
    assert (config["use_sliding_window"], config["model_type"]) == (False, family)


def test_a_bias_that_a_qwen2_file_lacks_is_zero(tiny_llama, write_gguf, tmp_path):
    model = tiny_llama(model_type="qwen2")
    found = load(gguf_to_hf(write_gguf(model, skip=("blk.1.attn_k.bias",)), tmp_path / "out"))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias.zero_()
    assert torch.equal(logits(found), logits(model))


def test_bos_and_eos_are_added_where_the_file_asks(tiny_llama, write_gguf, tmp_path):
    def metadata(writer):
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(True)

    tokenizer = AutoTokenizer.from_pretrained(gguf_to_hf(write_gguf(tiny_llama(), metadata=metadata), tmp_path / "out"))
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello").input_ids) == ["<s>", "hello", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello", add_special_tokens=False).input_ids) == ["hello"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "mamba"}, "architecture 'mamba'"),
        ({"skip": ("blk.1.ffn_up.weight",)}, r"1 weights are missing.*model\.layers\.1\.mlp\.up_proj\.weight"),
        (
            {"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((2, 64), np.float32)}},
            "blk.0.ffn_gate_inp.weight has no place",
        ),
        (
            {"skip": ("output_norm.weight",), "tensors": {"output_norm.weight": np.ones(63, np.float32)}},
            r"shape \[63\]",
        ),
        ({"skip": ("output_norm.weight",), "tensors": {"output_norm.weight": np.full(64, np.nan, np.float32)}}, "NaN"),
        ({"metadata": lambda writer: writer.add_expert_count(8)}, "expert_count"),
        ({"metadata": lambda writer: writer.add_uint16("split.count", 3)}, "one of 3 parts"),
        ({"tensors": {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}}, "rope_freqs.weight don't follow"),
        ({"metadata": lambda writer: writer.add_key_length(32)}, "partial rotary"),
        ({"metadata": lambda writer: writer.add_pad_token_id(300)}, "pad_token_id 300"),
        ({"family": "qwen2", "skip": ("blk.0.attn_q.weight",)}, r"the first is model\.layers\.0\.self_attn\.q_proj"),
        (
            {"family": "qwen2", "metadata": lambda writer: writer.add_sliding_window(32)},
            "qwen2.attention.sliding_window",
        ),
        (
            {"family": "qwen2", "tensors": {"blk.0.attn_output.bias": np.ones(64, np.float32)}},
            "attn_output.bias has no place in a qwen2 model",
        ),
        (
            {"family": "qwen3", "skip": ("blk.1.attn_k_norm.weight",)},
            r"the first is model\.layers\.1\.self_attn\.k_norm",
        ),
        (
            {"family": "qwen2", "tensors": {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}},
            "attn_q_norm.weight has no place in a qwen2 model",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_can_not_be_converted_is_named(tiny_llama, write_gguf, tmp_path, options, message):
    family = options.get("family", "llama")
    path = write_gguf(tiny_llama(model_type=family), **{k: v for k, v in options.items() if k != "family"})
    with pytest.raises(ConversionError, match=message):
        gguf_to_hf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing may be left behind"


def test_fp16_overflow_is_refused(tiny_llama, write_gguf, tmp_path):
    path = write_gguf(
        tiny_llama(), skip=("output_norm.weight",), tensors={"output_norm.weight": np.full(64, 1e6, np.float32)}
    )
    with pytest.raises(ConversionError, match=r"output_norm.weight overflows float16"):
        gguf_to_hf(path, tmp_path / "out", dtype="float16")


def test_full_directory_and_unknown_dtype_are_refused(tiny_llama, write_gguf, tmp_path):
    path = write_gguf(tiny_llama())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(ConversionError, match="not an empty directory"):
        gguf_to_hf(path, tmp_path / "out")
    assert (tmp_path / "out/mine.txt").read_text() == "keep"
    with pytest.raises(ConversionError, match="int3"):
        gguf_to_hf(path, tmp_path / "other", dtype="int3")


@pytest.mark.slow
def test_smollm2_equals_transformers_own_gguf_loading(smollm2_dir, tmp_path):
    source = fetch_file("smollm2-135m-instruct")
    # transformers wants the file under a directory of its own choosing a name
    shutil.copy(source, tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    ours = AutoModelForCausalLM.from_pretrained(smollm2_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    ids = tokenizer("Paris is the capital of France. In 1889 the Eiffel Tower,", return_tensors="pt").input_ids
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-3
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    texts = [
        tokenizer.decode(
            model.generate(**prompt, max_new_tokens=16, do_sample=False)[0][prompt["input_ids"].shape[1] :]
        )
        for model in (ours, theirs)
    ]
    assert texts[0] == texts[1]
    assert "Paris" in texts[0]
