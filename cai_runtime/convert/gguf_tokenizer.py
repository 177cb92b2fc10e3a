"""tokenizer.json, tokenizer_config.json and chat templates from a GGUF file's metadata.

A GGUF holds a vocabulary, merges or scores, and the *name* of its pre-tokenizer; llama.cpp's source maps that name to
splitting rules, and so does this module, with the `tokenizers` library alone. (transformers can build a tokenizer from
a GGUF too, but uses GPT-2's rule for every name it doesn't know, SmolLM's among them.) A rule that is not in the table
is refused, because a wrong one gives plausible token ids that the model never saw.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.convert.gguf_file import GGUFFile
from cai_runtime.errors import ConversionError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Token types of the metadata.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Pre-tokenizer name: GPT-2's own rule, GPT-2's after digits are set apart, or a regular expression.
_GPT2, _DIGITS_GPT2 = "gpt2", "digits+gpt2"
_SPLITS = {
    **dict.fromkeys(("gpt-2", "gpt2", "olmo", "mpt", "phi-2", "jina-v2-de", "jina-v2-es"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS_GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
# Words that are whole in the vocabulary are not cut into merges, even where no merge leads to them.
_IGNORE_MERGES = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
# Text is put into Unicode's normalization form C, which llama.cpp leaves out.
_NFC = {"qwen2"}
# llama.cpp's converter calls every token of the form <|...|> a control token; Qwen's tokenizer.json shows these in texts.
_SHOWN = {
    "qwen2": {f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")}
}


def write_tokenizer(file: GGUFFile, directory: Path, *, vocab_size: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and, where the file holds them, chat templates.

    `vocab_size`: rows of the embedding. Raises ConversionError for tokenizers other than byte-level and sentencepiece
    BPE, unknown splitting rules, and metadata that contradicts itself.
    """
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ConversionError(f"{file.path}: no tokenizer in the metadata (tokenizer.ggml.tokens)")
    if len(tokens) > vocab_size:
        raise ConversionError(f"{file.path}: {len(tokens)} tokens, but the embedding has {vocab_size} rows")
    tokenizer = build_tokenizer(file)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = _tokenizer_config(file, tokens)
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    template = file.metadata.get("tokenizer.chat_template")
    if template:
        (directory / "chat_template.jinja").write_text(template)
    for name in file.metadata.get("tokenizer.chat_templates") or []:
        extra = directory / "additional_chat_templates"
        extra.mkdir(exist_ok=True)
        if not name.replace("_", "").replace("-", "").isalnum():
            raise ConversionError(f"{file.path}: {name!r} can't name a chat template")
        (extra / f"{name}.jinja").write_text(file.metadata.get(f"tokenizer.chat_template.{name}", ""))


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer that the metadata describes, as a `tokenizers.Tokenizer`; raises ConversionError."""
    model = file.metadata.get("tokenizer.ggml.model")
    tokens = file.metadata["tokenizer.ggml.tokens"]
    types = file.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ConversionError(f"{file.path}: {len(tokens)} tokens but {len(types)} token types")
    # Fillers for the embedding's last rows are no tokens of the model: nothing may spell them.
    used = max((i + 1 for i, kind in enumerate(types) if kind != _UNUSED), default=0)
    tokens, types = tokens[:used], types[:used]
    if model == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif model == "llama":
        tokenizer = _sentencepiece(file, tokens, types)
    else:
        raise ConversionError(f"{file.path}: tokenizer {model!r} is not converted; known: gpt2, llama")
    _add_special_tokens(tokenizer, tokens, types, _SHOWN.get(str(file.metadata.get("tokenizer.ggml.pre")), set()))
    if tokenizer.get_vocab_size() != len(set(tokens)):
        raise ConversionError(f"{file.path}: the tokenizer's special tokens don't match its vocabulary")
    _add_begin_and_end(file, tokenizer, tokens)
    return tokenizer


def _byte_level(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE. GPT-2: https://cdn.openai.com/better-language-models/language_models_are_unsupervised.pdf"""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = file.metadata.get("tokenizer.ggml.pre")
    split = _SPLITS.get(name) if isinstance(name, str) else None
    if split is None:
        raise ConversionError(
            f"{file.path}: the splitting rule {name!r} (tokenizer.ggml.pre) is not known; known: {', '.join(_SPLITS)}"
        )
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ConversionError(f"{file.path}: metadata key tokenizer.ggml.merges is missing")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if bad := next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None):
        raise ConversionError(f"{file.path}: {bad!r} is not a merge of two tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=name in _IGNORE_MERGES)  # type: ignore[arg-type]
    except Exception as e:
        raise ConversionError(f"{file.path}: the merges don't fit the vocabulary: {e}") from e
    tokenizer = Tokenizer(model)
    if name in _NFC:
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    if split in (_GPT2, _DIGITS_GPT2):
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split == _DIGITS_GPT2 else []
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    else:
        steps = [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """Sentencepiece BPE with byte fallback, its merges recovered from the pieces' scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ConversionError(f"{file.path}: tokenizer.ggml.scores is missing or not one for each token")
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    model = models.BPE(
        vocab=vocab, merges=merges_from_scores(tokens, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    # llama.cpp puts the space before the text and again after every special token: the normalizer sees those stretches.
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    decode += [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(decode)  # type: ignore[assignment]
    return tokenizer


def merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Merges that rebuild each piece from any two pieces that it splits into, best score first.

    Sentencepiece merges whichever neighbours make the best-scored piece; ranked merges do the same when the rank of a
    pair is the rank of what it makes.
    """
    index = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in index and right in index:
                ranked.append((-score, index[token], index[left], index[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], shown: set[str]) -> None:
    """Control tokens stay whole and vanish from decoded text; user-defined ones, and those of `shown`, stay whole."""
    from tokenizers import AddedToken

    kinds = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
    for kind, special in kinds.items():
        found = [token for token, of in zip(tokens, types, strict=True) if of == kind and token]
        tokenizer.add_tokens(
            [AddedToken(token, normalized=False, special=special and token not in shown) for token in found]
        )


def _add_begin_and_end(file: GGUFFile, tokenizer: Tokenizer, tokens: list[str]) -> None:
    """Let the tokenizer put begin and end tokens around a text, where the file asks for it."""
    from tokenizers import processors

    meta = file.metadata
    # llama.cpp's defaults for files without the flag: sentencepiece and llama3 vocabularies begin with bos.
    begins = meta.get("tokenizer.ggml.model") == "llama" or meta.get("tokenizer.ggml.pre") in (
        "llama-bpe",
        "llama3",
        "llama-v3",
    )
    parts: dict[str, str | None] = {
        "bos": _token(file, tokens, "bos") if meta.get("tokenizer.ggml.add_bos_token", begins) else None,
        "eos": _token(file, tokens, "eos") if meta.get("tokenizer.ggml.add_eos_token", False) else None,
    }
    if not any(parts.values()):
        return
    before, after = (f"{parts[part]}:{{kind}} " if parts[part] else "" for part in ("bos", "eos"))

    def around(text: str, kind: int) -> str:
        return f"{before.format(kind=kind)}{text}:{kind} {after.format(kind=kind)}".strip()

    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=around("$A", 0),
        pair=f"{around('$A', 0)} {around('$B', 1)}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in parts.values() if token],
    )


def _token(file: GGUFFile, tokens: list[str], name: str) -> str | None:
    """The token that the metadata names bos, eos, unknown or padding; None when it names none."""
    index = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ConversionError(f"{file.path}: tokenizer.ggml.{name}_token_id {index!r} is outside the vocabulary")
    return tokens[index]


def _tokenizer_config(file: GGUFFile, tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is, whatever the model type.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length"),
        "bos_token": _token(file, tokens, "bos"),
        "eos_token": _token(file, tokens, "eos"),
        "unk_token": _token(file, tokens, "unknown"),
        "pad_token": _token(file, tokens, "padding"),
    }
    return {key: value for key, value in config.items() if value is not None}
