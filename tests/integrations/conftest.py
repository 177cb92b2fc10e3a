"""Tiny slim llamas of every kind and store, made on the spot."""

import os
import subprocess
import sys

import pytest
import torch

from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.writer import CheckpointWriter

WORDS = ["<unk>", "<eos>", *(f"w{k}" for k in range(60))]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_tokenizer(path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(path)


def tiny_config(*, tied=True, bias=False, dtype="float32", **overrides):
    sizes = {
        "vocab_size": 62,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    from transformers import LlamaConfig

    return LlamaConfig(
        **{**sizes, **overrides},
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        bos_token_id=None,
        eos_token_id=1,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )


def spec_of(kind, store, out, inp):
    match kind:
        case "dense":
            return ModuleSpec("dense", out, inp, None, (store,))
        case "mpo":
            return ModuleSpec("mpo", out, inp, (6,), (store, store), (out // 8, 8), (inp // 8, 8))
    return ModuleSpec(kind, out, inp, min(out, inp) // 2, (store, store))


def random_cores(spec):
    """So that the dense weight's numbers are about 0.3 / sqrt(in)."""
    parts = len(spec.core_shapes)
    size = (2.0 / spec.in_features**0.5) ** (1 / parts)
    return [torch.randn(shape) * size / max(shape[-1] if parts > 1 and k else 1, 1) ** 0.25 for k, shape in
            enumerate(spec.core_shapes)]  # fmt: skip


def tiny_slim(path, kind="interpolative", store="int8", *, embedding="int8", head=None, seed=0, tied=True, **options):
    """A random slim llama of two blocks with a tokenizer. kind, store: of its linear layers (a list: in turn).
    embedding, head: stores; head None: tied, unless it is (kind, store)."""
    torch.manual_seed(seed)
    config = tiny_config(tied=head is None and tied, **options)
    source = path.with_name(f"{path.name}-tokenizer")
    save_tokenizer(source)
    hidden, width = config.hidden_size, config.intermediate_size
    kv = hidden * config.num_key_value_heads // config.num_attention_heads
    shapes = dict(zip(PROJECTIONS, [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (width, hidden),
                                    (width, hidden), (hidden, width)], strict=True))  # fmt: skip
    kinds = kind if isinstance(kind, list) else [kind]
    dtype = getattr(torch, options.get("dtype", "float32"))

    def add(name, kind, store, out, inp, bias):
        spec = spec_of(kind, store, out, inp)
        pivot = torch.randperm(out) if spec.has_pivot else None
        writer.add_module(name, spec, random_cores(spec), pivot, torch.randn(out).to(dtype) if bias else None)

    with CheckpointWriter(path, config=config.to_diff_dict(), source_dir=source) as writer:
        add("model.embed_tokens", "dense", embedding, config.vocab_size, hidden, False)
        for layer in range(config.num_hidden_layers):
            for k, (name, shape) in enumerate(shapes.items()):
                part = "self_attn" if k < 4 else "mlp"
                add(f"model.layers.{layer}.{part}.{name}", kinds[k % len(kinds)], store, *shape, options.get("bias"))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                writer.add_tensor(f"model.layers.{layer}.{norm}.weight", (1 + 0.1 * torch.randn(hidden)).to(dtype))
        writer.add_tensor("model.norm.weight", torch.ones(hidden, dtype=dtype))
        if head is not None:
            add("lm_head", *head, config.vocab_size, hidden, False)
        writer.finish()
    return path


@pytest.fixture(autouse=True)
def environment():
    """PEFT's BOFT sets CC and CXX, and leaves them set where it can't build its extension."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def make_slim(tmp_path):
    return lambda *args, **options: tiny_slim(tmp_path / "slim", *args, **options)


@pytest.fixture(scope="session")
def slim(tmp_path_factory):
    """Modules of all kinds, int8, tied int8 embedding."""
    return tiny_slim(tmp_path_factory.mktemp("shared") / "slim", ["interpolative", "lowrank", "mpo", "dense"])


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    """Modules of one kind, int8, tied int8 embedding: the kind -> the directory."""
    return {
        kind: tiny_slim(tmp_path_factory.mktemp(kind) / "slim", kind, "int8") for kind in ("dense", "interpolative")
    }


@pytest.fixture(scope="session")
def ids():
    return torch.randint(2, 62, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def python():
    """Run code in a fresh interpreter; returns the finished process."""

    def run(code, *arguments):
        return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)

    return run
