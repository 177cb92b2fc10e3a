"""Qwen2.5-Coder-0.5B-Instruct, pulled in parts and converted from GGUF: its tokenizer is Qwen's, its text transformers'."""

from __future__ import annotations

import contextlib
import json
import unicodedata
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from cai_runtime.convert.sources import fetch_file
from cai_runtime.engine.open import load_tokenizer, open_engine
from cai_runtime.engine.request import Request, SamplingParams

TOKENS = 40
PROMPTS = ["def quicksort(xs):\n", "The capital of France is", "Explain HTTP caching to a beginner.\n\n"]
# Ids that Qwen publishes.
IDS = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_pad|>": 151654,
    "<tool_call>": 151657, "</tool_call>": 151658, "<|fim_prefix|>": 151659, "<|fim_middle|>": 151660,
    "<|fim_suffix|>": 151661, "<|fim_pad|>": 151662, "<|repo_name|>": 151663, "<|file_sep|>": 151664,
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": {"type": "object"}},
}

pytestmark = pytest.mark.slow


def test_greedy_text_is_transformers(qwen_dir: Path):
    tokenizer = load_tokenizer(qwen_dir)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    requests = [Request(each, SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)) for each in ids]
    with open_engine(qwen_dir, kv_cache="64MiB", progress=False) as engine:
        ours = [list(handle.result(timeout=600).token_ids) for handle in engine.submit_all(requests)]
    model = AutoModelForCausalLM.from_pretrained(qwen_dir, dtype=torch.float32)
    for prompt, text in zip(ids, ours, strict=True):
        with torch.inference_mode():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        assert text == out[0, len(prompt) :].tolist()


def test_tokens_are_qwens(qwen_dir: Path, wikipedia_texts: list[str]):
    ours, stock = load_tokenizer(qwen_dir), AutoTokenizer.from_pretrained(qwen_dir)
    source = fetch_file("qwen2.5-coder-0.5b-instruct")
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    assert len(ours) == 151665
    assert {token: ours.convert_tokens_to_ids(token) for token in IDS} == IDS
    special = {token.content for token in ours.added_tokens_decoder.values() if token.special}
    assert special.isdisjoint({"<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|file_sep|>"})
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>"} <= special
    known = theirs.get_vocab()
    assert all(known[token] == index for token, index in ours.get_vocab().items())
    samples = [article[:4000] for article in wikipedia_texts[::5]]
    samples += [
        "it's 1234½\r\n\n  x",
        "def f(x):\n\treturn x\n\n\n",
        "你好，世界 🙂🏽 مرحبا",
        "<|im_start|>user\nhi<|im_end|>",
    ]
    for text in samples:
        text = unicodedata.normalize("NFC", text)  # transformers' reader of GGUF leaves that out
        ids = ours(text).input_ids
        assert ids == theirs(text).input_ids == stock(text).input_ids
        assert ours.decode(ids) == text
    assert ours("cafe\u0301").input_ids == ours("caf\u00e9").input_ids


def test_template_and_ends_are_those_of_the_file(qwen_dir: Path):
    ends = json.loads((qwen_dir / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [IDS["<|im_end|>"], IDS["<|endoftext|>"]]
    tokenizer = load_tokenizer(qwen_dir)
    turns = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, tools=[TOOL], add_generation_prompt=True, tokenize=False)
    assert "<tools>\n" + json.dumps(TOOL) + "\n</tools>" in text
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_weights_are_those_of_the_file(qwen_dir: Path):
    """By the gguf package, which transformers reads with: all of them through transformers takes minutes."""
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    whole = {
        "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }  # fmt: skip
    seen = set()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(qwen_dir.glob("*.safetensors"))]
        ours = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it has no iterator
        for tensor in gguf.GGUFReader(fetch_file("qwen2.5-coder-0.5b-instruct")).tensors:
            if (name := whole.get(tensor.name)) is None:
                _, layer, part, kind = tensor.name.split(".")
                if int(layer) % 8:
                    continue
                name = f"model.layers.{layer}.{parts[part]}.{kind}"
            want = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            torch.testing.assert_close(ours[name].get_tensor(name).float(), want.float(), rtol=0, atol=1e-6)
            seen.add(name)
    assert len(seen) == 3 + 3 * 12  # nine weights and three biases of a layer
