"""Whisper in CTranslate2's layout: what each variable is in Hugging Face's, and what the config files say.

CTranslate2 stacks the query, key and value projections (of cross-attention: key and value) into one matrix and gives the
key a bias of zeros, which Whisper's key projection does not have. Of equal arrays its converter keeps the first and writes
an alias for every other one: the head when it is the embedding, but also, say, biases that are all zeros.

Layout: `WhisperSpec`, `TransformerDecoderSpec` and `MultiHeadAttentionSpec` in
https://github.com/OpenNMT/CTranslate2/tree/master/python/ctranslate2/specs
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from cai_runtime.convert.ctranslate2_file import CTranslate2File
from cai_runtime.errors import ConversionError

SPEC, REVISIONS = "WhisperSpec", (3,)
# Scalars that say how the model computes, and the one value that Whisper has.
_COMPUTES = {
    "decoder/activation": 3,  # GELU, the exact one
    "decoder/alibi": 0,
    "decoder/alibi_use_positive_positions": 1,
    "decoder/scale_alibi": 0,
    "decoder/multi_query_attention": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
_IGNORED = {"decoder/alibi_use_positive_positions", "decoder/alignment_heads", "decoder/alignment_layer"}
_TOP = {
    "encoder/conv1": "model.encoder.conv1",
    "encoder/conv2": "model.encoder.conv2",
    "encoder/layer_norm": "model.encoder.layer_norm",
    "decoder/layer_norm": "model.decoder.layer_norm",
    "decoder/embeddings": "model.decoder.embed_tokens",
    "decoder/projection": "proj_out",
}
_LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_STACKED = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}
_PARTS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}

SAMPLE_RATE, CHUNK_SECONDS, HOP, WINDOW = 16_000, 30, 160, 400
MAX_INITIAL_TIMESTAMP = 50  # in steps of 0.02 s, OpenAI's default


@dataclass(frozen=True)
class Weight:
    """One tensor of the Hugging Face model: part `index` of `parts` equal ones of a variable's rows. The variable's name may
    be an alias."""

    name: str
    shape: tuple[int, ...]
    variable: str
    index: int = 0
    parts: int = 1

    def of(self, values: np.ndarray) -> np.ndarray:
        """This tensor's rows out of the variable's."""
        return values.reshape(self.parts, -1, *values.shape[1:])[self.index]


class Whisper:
    """A Whisper in an open file, with its config.json and its vocabulary (tokens by id).

    Raises ConversionError when variables are missing, left over, or contradict each other.
    """

    def __init__(self, file: CTranslate2File, extra: dict[str, Any], vocabulary: list[str]):
        self._file, self._extra, self.vocabulary = file, extra, vocabulary
        self._ids = {token: at for at, token in enumerate(vocabulary)}
        for name, value in _COMPUTES.items():
            if name in file and name not in _IGNORED and file.scalar(name) != value:
                raise ConversionError(f"{file.path}: {name} is {file.scalar(name)}, Whisper's is {value}")
        self._weights = self._find_weights()
        self._check()

    @property
    def tied(self) -> bool:
        """Whether the head is the token embedding."""
        head, embedding = "decoder/projection/weight", "decoder/embeddings/weight"
        return head in self._file.aliases and self._file.variable(head) is self._file.variable(embedding)

    @property
    def first_timestamp(self) -> int:
        """Id of <|0.00|>, behind which only times come."""
        return self._id("<|notimestamps|>") + 1

    @property
    def multilingual(self) -> bool:
        # OpenAI's two vocabularies differ by one token of text, and that shifts all special ones.
        return self._id("<|endoftext|>") != 50256

    def weights(self) -> list[Weight]:
        """Every tensor of the Hugging Face model, in its order of layers."""
        return list(self._weights.values())

    def config(self, dtype: str) -> dict[str, Any]:
        """config.json for weights of `dtype`."""
        shapes = {weight.name: weight.shape for weight in self.weights()}
        width, mels, _ = shapes["model.encoder.conv1.weight"]
        end = self._id("<|endoftext|>")
        return {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "vocab_size": shapes["model.decoder.embed_tokens.weight"][0],
            "num_mel_bins": mels,
            "d_model": width,
            "encoder_layers": self._layers("encoder"),
            "encoder_attention_heads": self._file.scalar("encoder/num_heads"),
            "encoder_ffn_dim": shapes["model.encoder.layers.0.fc1.weight"][0],
            "decoder_layers": self._layers("decoder"),
            "decoder_attention_heads": self._file.scalar("decoder/num_heads"),
            "decoder_ffn_dim": shapes["model.decoder.layers.0.fc1.weight"][0],
            "num_hidden_layers": self._layers("encoder"),
            "max_source_positions": shapes["model.encoder.embed_positions.weight"][0],
            "max_target_positions": shapes["model.decoder.embed_positions.weight"][0],
            "activation_function": "gelu",
            "scale_embedding": False,
            "is_encoder_decoder": True,
            "tie_word_embeddings": self.tied,
            "bos_token_id": end if self.multilingual else self._id("<|startoftranscript|>"),
            "eos_token_id": end,
            "pad_token_id": end,
            "decoder_start_token_id": self._id("<|startoftranscript|>"),
            "use_cache": True,
            "dtype": dtype,
        }

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, with what config.json of the source says of suppressed tokens and alignment."""
        end, positions = self._id("<|endoftext|>"), self._shape("model.decoder.embed_positions.weight")[0]
        found: dict[str, Any] = {
            "bos_token_id": end if self.multilingual else self._id("<|startoftranscript|>"),
            "eos_token_id": end,
            "pad_token_id": end,
            "decoder_start_token_id": self._id("<|startoftranscript|>"),
            "prev_sot_token_id": self._id("<|startofprev|>"),
            "no_timestamps_token_id": self._id("<|notimestamps|>"),
            "max_initial_timestamp_index": MAX_INITIAL_TIMESTAMP,
            "max_length": positions,
            "return_timestamps": False,
            "is_multilingual": self.multilingual,
        }
        if self.multilingual:
            first, last = self._id("<|startoftranscript|>") + 1, self._id("<|translate|>")
            found["lang_to_id"] = {self.vocabulary[at]: at for at in range(first, last)}
            found["task_to_id"] = {task: self._id(f"<|{task}|>") for task in ("transcribe", "translate")}
            found["task"] = "transcribe"  # transformers' generate names no task without it
        place = self._file.path.with_name("config.json")
        for theirs, ours in {"suppress_ids": "suppress_tokens", "suppress_ids_begin": "begin_suppress_tokens"}.items():
            ids = self._extra.get(theirs)
            if ids is None or ids == []:  # nothing is suppressed
                continue
            if not isinstance(ids, list) or not all(_below(i, len(self.vocabulary)) for i in ids):
                raise ConversionError(f"{place}: {theirs} is not a list of ids")
            found[ours] = ids
        pairs = self._extra.get("alignment_heads")
        if pairs:
            layers, heads = self._layers("decoder"), int(self._file.scalar("decoder/num_heads"))
            whole = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
            if not whole or not all(_below(layer, layers) and _below(head, heads) for layer, head in pairs):
                raise ConversionError(f"{place}: alignment_heads is not a list of [layer, head] of the decoder")
            found["alignment_heads"] = pairs
        return found

    def preprocessor_config(self) -> dict[str, Any]:
        """preprocessor_config.json of Whisper's log-mel features."""
        samples = SAMPLE_RATE * CHUNK_SECONDS
        return {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "processor_class": "WhisperProcessor",
            "feature_size": self._shape("model.encoder.conv1.weight")[1],
            "sampling_rate": SAMPLE_RATE,
            "chunk_length": CHUNK_SECONDS,
            "n_samples": samples,
            "nb_max_frames": samples // HOP,
            "hop_length": HOP,
            "n_fft": WINDOW,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": False,
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        end = "<|endoftext|>"
        return {
            "tokenizer_class": "WhisperTokenizer",
            "processor_class": "WhisperProcessor",
            "bos_token": end,
            "eos_token": end,
            "unk_token": end,
            "pad_token": end,
            # transformers takes what comes behind the last of its special tokens for times.
            "additional_special_tokens": self.vocabulary[self._id(end) : self.first_timestamp],
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._shape("model.decoder.embed_positions.weight")[0],
        }

    # -- the variables -----------------------------------------------------------------------------------------------

    def _find_weights(self) -> dict[str, Weight]:
        file, found = self._file, dict[str, Weight]()
        for name in sorted((*file.variables, *file.aliases)):  # the converter's order
            if name in _COMPUTES or name in _IGNORED or name.endswith(("/num_heads", "_scale")):
                continue
            if name == "decoder/projection/weight" and self.tied:
                continue
            weights = _weights_of(name, file.variable(name).shape)
            if not weights:
                raise ConversionError(f"{file.path}: variable {name} has no place in Whisper")
            found |= {weight.name: weight for weight in weights}
        for name, weight in list(found.items()):
            if name.endswith(".k_proj.bias"):
                if weight.of(file.array(weight.variable)).any():
                    raise ConversionError(f"{file.path}: {weight.variable} gives the key a bias, which Whisper lacks")
                del found[name]
        return found

    def _check(self) -> None:
        """Raise ConversionError unless every weight of a Whisper of these sizes is there, in its shape."""
        file = self._file
        try:
            (width, mels, kernel), (vocabulary, _) = (
                self._shape("model.encoder.conv1.weight"),
                self._shape("model.decoder.embed_tokens.weight"),
            )
            inner = {side: self._shape(f"model.{side}.layers.0.fc1.weight")[0] for side in ("encoder", "decoder")}
            lengths = {side: self._shape(f"model.{side}.embed_positions.weight")[0] for side in ("encoder", "decoder")}
        except (KeyError, ValueError, IndexError) as e:
            raise ConversionError(f"{file.path}: not a whole Whisper: {e}") from None
        expected = expected_shapes(width, mels, kernel, vocabulary, inner, lengths, self._layers)
        if not self.tied:
            expected["proj_out.weight"] = (vocabulary, width)
        for name, weight in self._weights.items():
            if weight.shape != expected.get(name):
                wanted = list(expected[name]) if name in expected else "no such tensor"
                raise ConversionError(
                    f"{file.path}: variable {weight.variable} ({name}) is {list(weight.shape)}, expected {wanted}"
                )
        if missing := sorted(set(expected) - set(self._weights)):
            raise ConversionError(f"{file.path}: {len(missing)} weights are missing, the first is {missing[0]}")
        for side in ("encoder", "decoder"):
            heads = file.scalar(f"{side}/num_heads")
            if heads < 1 or width % heads:
                raise ConversionError(f"{file.path}: {side}/num_heads {heads} does not divide the width {width}")
        if len(self.vocabulary) != vocabulary:
            raise ConversionError(
                f"{file.path}: the vocabulary beside it has {len(self.vocabulary)} tokens, the model {vocabulary}"
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape

    def _layers(self, side: str) -> int:
        numbers = [int(m[1]) for name in self._weights if (m := re.match(rf"model\.{side}\.layers\.(\d+)\.", name))]
        return max(numbers, default=-1) + 1

    def _id(self, token: str) -> int:
        if token not in self._ids:
            raise ConversionError(f"{self._file.path}: the vocabulary beside it has no {token}")
        return self._ids[token]


def expected_shapes(
    width: int, mels: int, kernel: int, vocabulary: int, inner: dict[str, int], lengths: dict[str, int], layers: Any
) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor of Hugging Face's Whisper but the head. `layers(side)`: their number."""
    square, flat = (width, width), (width,)

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": flat, f"{name}.bias": flat}

    def attention(name: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{name}.{part}_proj.weight": square for part in ("q", "k", "v", "out")}
        return shapes | {f"{name}.{part}_proj.bias": flat for part in ("q", "v", "out")} | norm(f"{name}_layer_norm")

    shapes: dict[str, tuple[int, ...]] = {
        "model.encoder.conv1.weight": (width, mels, kernel),
        "model.encoder.conv1.bias": flat,
        "model.encoder.conv2.weight": (width, width, kernel),
        "model.encoder.conv2.bias": flat,
        "model.decoder.embed_tokens.weight": (vocabulary, width),
    }
    for side in ("encoder", "decoder"):
        shapes |= {f"model.{side}.embed_positions.weight": (lengths[side], width), **norm(f"model.{side}.layer_norm")}
        for layer in range(layers(side)):
            name = f"model.{side}.layers.{layer}"
            shapes |= attention(f"{name}.self_attn") | norm(f"{name}.final_layer_norm")
            shapes |= {f"{name}.fc1.weight": (inner[side], width), f"{name}.fc1.bias": (inner[side],)}
            shapes |= {f"{name}.fc2.weight": (width, inner[side]), f"{name}.fc2.bias": flat}
            if side == "decoder":
                shapes |= attention(f"{name}.encoder_attn")
    return shapes


def _below(value: Any, bound: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < bound


def _weights_of(variable: str, shape: tuple[int, ...]) -> list[Weight]:
    """What a variable of this name and shape becomes; nothing when Whisper has no such variable."""
    if match := re.fullmatch(r"(encoder|decoder)/position_encodings/encodings", variable):
        return [Weight(f"model.{match[1]}.embed_positions.weight", shape, variable)]
    stem, _, part = variable.rpartition("/")
    if part not in _PARTS or not shape:
        return []
    if stem in _TOP:
        return [Weight(f"{_TOP[stem]}.{_PARTS[part]}", shape, variable)]
    match = re.fullmatch(r"(encoder|decoder)/layer_(\d+)/(.+)", stem)
    if match is None:
        return []
    prefix, inside = f"model.{match[1]}.layers.{int(match[2])}", match[3]
    if inside in _LAYER:
        return [Weight(f"{prefix}.{_LAYER[inside]}.{_PARTS[part]}", shape, variable)]
    names = _STACKED.get(inside, ())
    if not names or shape[0] % len(names):
        return []
    rows = (shape[0] // len(names), *shape[1:])
    return [Weight(f"{prefix}.{name}.{_PARTS[part]}", rows, variable, k, len(names)) for k, name in enumerate(names)]
