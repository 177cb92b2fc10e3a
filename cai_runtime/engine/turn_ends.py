"""Which tokens end a text or an assistant's turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cai_runtime.errors import InvalidConfigError

# A turn that calls a tool ends with a token of its own, which templates write in that case alone.
_CALL_ENDS = ("<|eom_id|>", "<|call|>")
_QUESTION, _ANSWER = "How many are they?", "They are seventeen."


def end_of_sequence_ids(path: Path, config: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a text, ascending.

    Taken together: generation_config.json, or config.json where that names none; the tokenizer's `eos_token`,
    `eot_token` and `eom_token`; and the added token that the chat template writes after an assistant's answer.
    Checkpoints whose metadata names the end of a document alone would otherwise run on after their answer. A token
    that is merely named like an end of turn (`<|end|>`, which divides the parts of one turn in some formats) is none.

    Args:
        path: the checkpoint directory.
        config: its config.json.
        tokenizer: transformers' tokenizer of it.

    Raises:
        InvalidConfigError: generation_config.json is no JSON object.
    """
    return tuple(sorted({*_stated(path, config), *_named(tokenizer), *template_ends(tokenizer)}))


def _stated(path: Path, config: dict[str, Any]) -> Iterator[int]:
    generation = path / "generation_config.json"
    try:
        stated = (
            json.loads(generation.read_text(encoding="utf-8-sig")).get("eos_token_id") if generation.exists() else None
        )
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as e:
        raise InvalidConfigError(f"not a JSON object: {e}", file=generation) from e
    if stated is None:
        stated = config.get("eos_token_id")
    for token in stated if isinstance(stated, list) else [stated]:
        if isinstance(token, int) and not isinstance(token, bool):
            yield token


def _named(tokenizer: Any) -> Iterator[int]:
    for name in ("eos_token_id", "eot_token_id", "eom_token_id"):
        if isinstance(token := getattr(tokenizer, name, None), int):
            yield token


def template_ends(tokenizer: Any) -> set[int]:
    """The tokens that the tokenizer's chat template ends an assistant's turn with; empty without a template, and for
    one that can't render a question with its answer."""
    template = getattr(tokenizer, "chat_template", None)
    # Special or not: converters leave the end of turn an ordinary added token at times.
    added = {str(t): token_id for token_id, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if str(t)}
    if not template or not added:
        return set()
    sources = template.values() if isinstance(template, dict) else [template]
    ends = {added[name] for name in _CALL_ENDS if name in added and any(name in str(s) for s in sources)}
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    except Exception:  # noqa: BLE001 - whatever a template raises; a chat that uses the template gets it as its error
        return ends
    _, found, after = str(text).rpartition(_ANSWER)
    after = after.lstrip()
    written = [token for token in added if found and after.startswith(token)]
    return ends | {added[max(written, key=len)]} if written else ends
