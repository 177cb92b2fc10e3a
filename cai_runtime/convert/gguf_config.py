"""config.json and generation_config.json from a GGUF file's metadata."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cai_runtime.convert.gguf_file import GGUFFile
from cai_runtime.errors import ConversionError

ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """A `general.architecture`, and what sets its model apart from llama. Its name is the `model_type` too."""

    name: str
    model_class: str
    permuted: bool = False
    """Whether the rows of queries and keys lie in llama.cpp's rotary order, as in llama alone."""
    qkv_bias: bool = False
    """Whether queries, keys and values always have biases, and the output never."""
    head_norms: bool = False
    """Whether queries and keys are normalized, each head by one weight of its size."""
    windows: bool = False
    """Whether config.json says by `use_sliding_window` that there are windows."""
    ends: tuple[str, ...] = ()
    """Control tokens that end a text beside those that the metadata names."""


# GGUF names no second end of a text for Qwen. Qwen's own generation_config.json lists <|endoftext|> after <|im_end|>.
_QWEN_ENDS = ("<|endoftext|>",)
ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture("llama", "LlamaForCausalLM", permuted=True),
        Architecture("qwen2", "Qwen2ForCausalLM", qkv_bias=True, windows=True, ends=_QWEN_ENDS),
        Architecture("qwen3", "Qwen3ForCausalLM", head_norms=True, windows=True, ends=_QWEN_ENDS),
    )
}


def architecture_of(file: GGUFFile) -> Architecture:
    """Raises ConversionError for an architecture that is not converted."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConversionError(f"{file.path}: architecture {name!r} is not converted yet; known: {known}")
    return ARCHITECTURES[name]


def model_config(file: GGUFFile, dtype: str) -> dict[str, Any]:
    """The config.json of a GGUF file, for weights of `dtype` ("float32", ...).

    What the weights show is taken from them (vocabulary size, tied head, biases), the rest from the metadata.
    Raises ConversionError for a missing key and for options that the architecture's config.json can't express.
    """
    meta, tensors, architecture = file.metadata, file.tensors, architecture_of(file)
    arch = architecture.name

    def need(key: str) -> Any:
        if (value := meta.get(f"{arch}.{key}")) is None:
            raise ConversionError(f"{file.path}: metadata key {arch}.{key} is missing")
        if isinstance(value, list):
            raise ConversionError(
                f"{file.path}: {arch}.{key} differs by layer, which {arch}'s config.json can't express"
            )
        return value

    for key in ("expert_count", "attention.sliding_window", "attention.temperature_length", "attention.scale"):
        if meta.get(f"{arch}.{key}"):
            raise ConversionError(f"{file.path}: {arch}.{key} is set; this option is not converted")
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise ConversionError(f"{file.path}: tensor token_embd.weight is missing or no matrix")

    hidden, heads = need("embedding_length"), need("attention.head_count")
    kv_heads = need("attention.head_count_kv") if f"{arch}.attention.head_count_kv" in meta else heads
    if min(hidden, heads, kv_heads) <= 0 or heads % kv_heads:
        raise ConversionError(f"{file.path}: {heads} heads, {kv_heads} key/value heads, width {hidden} can't be")
    rotary = meta.get(f"{arch}.rope.dimension_count")
    head_dim = meta.get(f"{arch}.attention.key_length") or rotary or hidden // heads
    if rotary not in (None, head_dim) or meta.get(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise ConversionError(f"{file.path}: partial rotary embedding or unequal key and value sizes are not converted")

    config: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": arch,
        "attention_dropout": 0.0,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "dtype": dtype,
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": need("feed_forward_length"),
        "max_position_embeddings": need("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": need("block_count"),
        "num_key_value_heads": kv_heads,
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": shortest_float(need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": rope_parameters(file, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        "use_cache": True,
        "vocab_size": tensors["token_embd.weight"].shape[0],
    }
    if not architecture.qkv_bias:
        config["attention_bias"] = _any_bias(file, "attn_q", "attn_output")
    if arch == "llama":
        config["mlp_bias"] = _any_bias(file, "ffn_gate", "ffn_up", "ffn_down")
    if architecture.windows:
        config["use_sliding_window"] = False
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config[key] is not None and not 0 <= config[key] < config["vocab_size"]:
            raise ConversionError(f"{file.path}: {key} {config[key]} is outside the {config['vocab_size']} tokens")
    return config


def _any_bias(file: GGUFFile, *parts: str) -> bool:
    return any(name.endswith(tuple(f"{part}.bias" for part in parts)) for name in file.tensors)


def generation_config(file: GGUFFile) -> dict[str, Any]:
    """generation_config.json: the token ids that begin, pad and end a text. The end of a turn (eot) and of a message that
    calls a tool (eom) end it too. Raises ConversionError for an id that is no token."""
    meta, tokens = file.metadata, file.metadata.get("tokenizer.ggml.tokens") or []
    size = len(tokens)
    ends = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends += [tokens.index(token) for token in architecture_of(file).ends if token in tokens]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    for end in ends:
        if not isinstance(end, int) or not 0 <= end < size:
            raise ConversionError(f"{file.path}: {end!r} is said to end a text, and is none of the {size} tokens")
    config = {
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in config.items() if value is not None}


def rope_parameters(file: GGUFFile, head_dim: int) -> dict[str, Any]:
    """Rotary embedding as transformers' `rope_parameters`.

    GGUF states linear and YaRN scaling in its metadata, and llama3's scaling as a tensor of per-frequency divisors.
    Raises ConversionError for other scalings.
    """
    meta, prefix = file.metadata, f"{architecture_of(file).name}.rope."
    theta = shortest_float(meta.get(f"{prefix}freq_base", 10000.0))
    kind = meta.get(f"{prefix}scaling.type")
    factor = meta.get(f"{prefix}scaling.factor")
    if kind is None and (old := meta.get(f"{prefix}scale_linear")):  # the key's name before 2023-10
        kind, factor = "linear", old
    rope: dict[str, Any] = {"rope_theta": theta}
    for name in file.tensors:
        if name.startswith("rope_factors"):
            raise ConversionError(f"{file.path}: tensor {name} (longrope) is not converted")
    if ROPE_FREQS in file.tensors:
        if kind not in (None, "none"):
            raise ConversionError(f"{file.path}: both {ROPE_FREQS} and {kind} rope scaling are given")
        divisors = file.array(file.tensors[ROPE_FREQS]).astype(np.float64).ravel()
        original = meta.get(f"{prefix}scaling.original_context_length")
        found = llama3_scaling(divisors, theta, head_dim, original)
        if found is None:
            raise ConversionError(f"{file.path}: the divisors in {ROPE_FREQS} don't follow llama3's rule")
        return rope | found
    if kind in (None, "none") or factor in (None, 0.0, 1.0):
        return rope | {"rope_type": "default"}
    factor = shortest_float(factor)
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return rope | {"rope_type": "yarn", "factor": factor} | _yarn(meta, f"{prefix}scaling.", factor)
    raise ConversionError(f"{file.path}: rope scaling {kind!r} is not converted")


def _yarn(meta: dict[str, Any], prefix: str, factor: float) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if (original := meta.get(prefix + "original_context_length")) is not None:
        options["original_max_position_embeddings"] = original
    for key in ("beta_fast", "beta_slow"):
        if (value := meta.get(f"{prefix}yarn_{key}")) is not None:
            options[key] = shortest_float(value)
    scale = meta.get(prefix + "yarn_attn_factor", meta.get(prefix + "attn_factor"))
    if scale not in (None, 1.0):
        # GGUF's factor multiplies YaRN's own 0.1 ln(factor) + 1; transformers' replaces it.
        options["attention_factor"] = scale * (0.1 * math.log(factor) + 1.0)
    return options


def llama3_divisors(theta: float, head_dim: int, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """What llama3's rule divides each of the head_dim/2 rotary frequencies by, fp64.

    Frequencies with a wavelength under `original`/`high` are kept, those over `original`/`low` are divided by `factor`,
    and between them the reciprocal moves linearly.
    """
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def llama3_scaling(
    divisors: np.ndarray, theta: float, head_dim: int, original: int | None = None
) -> dict[str, Any] | None:
    """The llama3 rope parameters that give these divisors, or None when none do. All ones: no scaling.

    Only the ratios of the rule's three lengths matter, so many triples give the same divisors; the published models'
    (low 1, high 4, original 8192) are tried first; otherwise low is taken as 1 and the others follow from two divisors.
    """
    if divisors.shape != (head_dim // 2,) or not (divisors > 0).all():
        return None
    if np.allclose(divisors, 1.0):
        return {"rope_type": "default"}
    factor = shortest_float(divisors.max())
    candidates = [(1.0, 4.0, float(length)) for length in (original, 8192) if length]
    between = np.flatnonzero((divisors > 1.0 + 1e-4) & (divisors < factor * (1 - 1e-4)))
    if len(between) >= 2:
        # smooth = slope / wavelength + start is a straight line in 1 / wavelength.
        reciprocal = theta ** (-2.0 * between / head_dim) / (2 * math.pi)
        smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(reciprocal, smooth, 1)
        if start < 0 < slope:
            high = 1.0 - 1.0 / start
            candidates.append((1.0, round(high, 3), float(round(slope * (high - 1.0)))))
    for low, high, length in candidates:
        if np.allclose(llama3_divisors(theta, head_dim, factor, low, high, length), divisors, rtol=2e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(length),
            }
    return None


def shortest_float(value: float) -> float:
    """The shortest decimal that is `value` in fp32: GGUF stores 1e-05 as 9.999999747e-06."""
    return float(str(np.float32(value)))
