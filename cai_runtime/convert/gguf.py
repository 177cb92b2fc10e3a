"""GGUF to a Hugging Face directory: weights, config, tokenizer, chat template."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cai_runtime.convert.cache import tqdm_disable
from cai_runtime.convert.gguf_config import ARCHITECTURES, ROPE_FREQS, architecture_of, generation_config, model_config
from cai_runtime.convert.gguf_file import GGUFFile, GGUFTensor
from cai_runtime.convert.safetensors_stream import DTYPES, Declared, encode, write_shards
from cai_runtime.errors import ConversionError

# Most bytes of fp32 values held at once.
_CHUNK_BYTES = 32 << 20

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_to_hf(
    gguf_path: str | Path, out_dir: str | Path, *, dtype: str = "auto", progress: bool | None = None
) -> Path:
    """Convert a GGUF file to a model directory in Hugging Face layout; returns `out_dir`.

    `dtype`: "float32", "float16", "bfloat16" for the written weights, or "auto": the matrices' own dtype when all are
    fp16 or all bf16, else float32 (a 4-bit block's values are not exact in 16 bits). With "auto" nothing is rounded: an
    fp32 vector (norm, bias) in an fp16 or bf16 file stays fp32 unless it is exact in the matrices' dtype. Quantized
    blocks are decoded to the values that they stand for. `out_dir` must not exist or be empty; it appears whole or not
    at all. Memory: a few chunks of 32 MiB and the vocabulary. `progress`: a bar on stderr, None on a terminal only.

    Raises ConversionError naming the file and the part: not GGUF, truncated, damaged, an architecture that is not
    converted, or an option of one that the layout can't express.
    """
    path, out = Path(gguf_path), Path(out_dir)
    if dtype != "auto" and dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"{out} already exists and is not an empty directory")
    partial = out.with_name(f".{out.name}.converting")
    with GGUFFile(path) as file:
        architecture_of(file)
        if (parts := file.metadata.get("split.count", 0)) > 1:
            raise ConversionError(f"{path}: one of {parts} parts; merge them first (llama-gguf-split --merge)")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write(file, partial, dtype, progress)
            if out.is_dir():
                out.rmdir()
            partial.rename(out)
        except OSError as e:
            raise ConversionError(f"{path}: can't write {out}: {e}") from e
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def _write(file: GGUFFile, directory: Path, dtype: str, progress: bool | None) -> None:
    from cai_runtime.convert.gguf_tokenizer import write_tokenizer

    keep_exact = dtype == "auto"
    config = model_config(file, _dtype_of(file) if keep_exact else dtype)
    _check_tensors(file, config)
    write_tokenizer(file, directory, vocab_size=config["vocab_size"])
    _write_weights(file, directory, config, keep_exact, progress)
    for name, content in (("config.json", config), ("generation_config.json", generation_config(file))):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; None when there is none."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def undo_permutation(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a query or key projection, whole heads, from GGUF's rotary order to Hugging Face's.

    llama.cpp rotates neighbouring pairs (0, 1), (2, 3), ... of llama; transformers halves (0, d/2), (1, d/2+1), ... .
    Each head stands alone, so grouped queries need no special case. rows [n * head_dim, ...] or a bias [n * head_dim].
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dtype_of(file: GGUFFile) -> str:
    kinds = {t.type_name for t in file.tensors.values() if len(t.shape) > 1}
    return {frozenset({"F16"}): "float16", frozenset({"BF16"}): "bfloat16"}.get(frozenset(kinds), "float32")


def _dtype_for(file: GGUFFile, tensor: GGUFTensor | None, dtype: str) -> str:
    """`dtype`, or "float32" for a vector that `dtype` would round."""
    if tensor is None or dtype == "float32" or len(tensor.shape) > 1:
        return dtype
    values = file.array(tensor)
    stored = encode(values, dtype)
    back = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored.astype(np.float32)
    return dtype if np.array_equal(back, values) else "float32"


def _expected_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Hugging Face name to shape, for every weight that the config implies."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    architecture = ARCHITECTURES[config["model_type"]]
    biased = set(attention) if config.get("attention_bias") else set()
    biased |= {"q_proj", "k_proj", "v_proj"} if architecture.qkv_bias else set()
    biased |= set(mlp) if config.get("mlp_bias") else set()
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if architecture.head_norms:
            shapes |= {f"{prefix}self_attn.{norm}.weight": (head,) for norm in ("q_norm", "k_norm")}
        for part, group in (("self_attn", attention), ("mlp", mlp)):
            shapes |= {f"{prefix}{part}.{name}.weight": shape for name, shape in group.items()}
            shapes |= {f"{prefix}{part}.{name}.bias": shape[:1] for name, shape in group.items() if name in biased}
    return shapes


def _check_tensors(file: GGUFFile, config: dict) -> None:
    """Raise ConversionError unless the file holds exactly the weights that its config implies, in their shapes."""
    expected = _expected_shapes(config)
    found = set()
    for name, tensor in file.tensors.items():
        if name == ROPE_FREQS:
            continue
        target = hf_name(name)
        if target is None or target not in expected:
            model_type = config["model_type"]
            raise ConversionError(
                f"{file.path}: tensor {name} has no place in a {model_type} model of this configuration"
            )
        if tensor.shape != expected[target]:
            raise ConversionError(
                f"{file.path}: tensor {name} has shape {list(tensor.shape)}, expected {list(expected[target])}"
            )
        found.add(target)
    # transformers' attention_bias, mlp_bias and qwen2 mean biases of all projections: zeros stand in for one that lacks.
    missing = sorted(name for name in set(expected) - found if not name.endswith(".bias"))
    if missing:
        raise ConversionError(f"{file.path}: {len(missing)} weights are missing, the first is {missing[0]}")


def _write_weights(file: GGUFFile, directory: Path, config: dict, keep_exact: bool, progress: bool | None) -> None:
    from tqdm import tqdm

    sources = {hf_name(name): tensor for name, tensor in file.tensors.items() if name != ROPE_FREQS}
    head_dim, dtype, architecture = config["head_dim"], config["dtype"], architecture_of(file)
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    with tqdm(
        desc=f"convert {file.path.name}", total=total, unit="B", unit_scale=True, disable=tqdm_disable(progress)
    ) as bar:

        def chunks(tensor: GGUFTensor | None, declared: Declared) -> Iterator[np.ndarray]:
            if tensor is None:
                yield encode(np.zeros(declared.shape, np.float32), declared.dtype)
                return
            permuted = architecture.permuted and (".q_proj." in declared.name or ".k_proj." in declared.name)
            row_values = int(np.prod(tensor.shape[1:], dtype=np.int64))
            # Whole heads in every chunk.
            rows = max(1, _CHUNK_BYTES // (4 * row_values * head_dim)) * head_dim
            for values in file.rows(tensor, rows):
                encoded = encode(undo_permutation(values, head_dim) if permuted else values, declared.dtype)
                if declared.dtype == "float16" and not np.isfinite(encoded).all():
                    raise ConversionError(f"{file.path}: tensor {tensor.name} overflows float16; convert to bfloat16")
                yield encoded
            bar.update(tensor.nbytes)

        declared = [
            Declared(name, shape, _dtype_for(file, sources.get(name), dtype) if keep_exact else dtype)
            for name, shape in _expected_shapes(config).items()
        ]
        write_shards(directory, ((d, chunks(sources.get(d.name), d)) for d in declared))
