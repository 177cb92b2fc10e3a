"""Tokenizes a rendered prompt so that control tokens come from the template's own text alone.

Control tokens are the tokenizer's added tokens: turn markers, tool markers, begin and end of text. The tokenizer finds
them by their spelling, in content too. Where content holds such a spelling, the prompt goes through a second tokenizer,
in which each control token is spelled by a secret. The template's own control tokens are respelled that way before
tokenizing, so content is left with spellings that mean nothing there.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections import Counter
from typing import Any

from cai_runtime.errors import ConversationError
from cai_runtime.formats.traced_text import TracedText, mask_of, plain

logger = logging.getLogger(__name__)

# Elements of web pages. Vocabularies such as Gemma's hold them as words, though they are added tokens.
_MARKUP = frozenset({
    "a", "b", "blockquote", "body", "caption", "code", "div", "em", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "html",
    "i", "iframe", "img", "li", "s", "span", "strong", "sub", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr",
    "u", "ul",
})  # fmt: skip


def control_tokens(tokenizer: Any, template_text: str = "") -> dict[str, int]:
    """Spelling to id of every added token that steers the model.

    All added tokens do, but for runs of whitespace and the elements of web pages that are words of the base vocabulary.
    A spelling that the template writes always does, whitespace apart.

    Args:
        tokenizer: transformers' tokenizer.
        template_text: the chat template's constant text.
    """
    words = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    found: dict[str, int] = {}
    for index, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        if not text.strip().strip("▁"):
            continue
        element = re.fullmatch(r"</?(\w+)>", text)
        is_markup = element is not None and element[1] in _MARKUP and not token.special
        if is_markup and text not in template_text and words is not None and words.token_to_id(text) is not None:
            continue
        found[text] = index
    return found


class PromptEncoder:
    """Text with provenance to token ids. Not for several threads at once, like the tokenizer.

    Args:
        tokenizer: transformers' tokenizer.
        template_text: the chat template's constant text.
    """

    def __init__(self, tokenizer: Any, template_text: str = ""):
        self._tokenizer = tokenizer
        self._control = control_tokens(tokenizer, template_text)
        # Of the spellings that begin at one place the tokenizer takes the longest.
        self._lengths = sorted({len(text) for text in self._control}, reverse=True)
        first = "".join(sorted({re.escape(text[0]) for text in self._control}))
        self._first = re.compile(f"[{first}]" if first else r"(?!)")
        self._markers = frozenset(self._control.values()) - _unknown_ids(tokenizer, template_text)
        # Made when content first needs them: one that shares the tokenizer's model, and one with a model of its own.
        self._copies: list[_RespelledTokenizer | None] = []

    def encode(self, prompt: TracedText) -> list[int]:
        """Token ids of the prompt. Without a control token's spelling in content they are the tokenizer's own.

        Raises:
            ConversationError: content holds a control token's spelling, and this tokenizer can't take it as text.
        """
        text, mask = plain(prompt), mask_of(prompt)
        expected = [self._control[text[start:end]] for start, end in self._own_matches(text, mask)]
        if not self._in_content(text, mask):
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if self._is_clean(ids, expected):
                return [int(token) for token in ids]
        for which, make in enumerate((_sharing_the_model, _with_its_own_model)):
            if len(self._copies) == which:
                self._copies.append(make(self._tokenizer, self._control))
            if copy := self._copies[which]:
                found = copy.encode(text, self._own_matches(text, mask))
                if found is not None and self._is_clean(found, expected):
                    return found
        raise ConversationError(
            f"The messages hold the spelling of a control token ({self._example(text, mask)}), and the tokenizer of "
            f"this model, {self._tokenizer.__class__.__name__}, can't take it as text: leave it out."
        )

    def _own_matches(self, text: str, mask: bytes) -> list[tuple[int, int]]:
        """Where the template wrote control tokens, in order: spans that hold no character of a caller's."""
        found = []
        for run in re.finditer(b"\x01+", mask):
            found += self._matches(text, run.start(), run.end())
        return found

    def _in_content(self, text: str, mask: bytes) -> bool:
        """Whether a control token's spelling touches a caller's text, as it stands or as the tokenizer normalizes it."""
        matches = self._matches(text, 0, len(text))
        if matches != self._own_matches(text, mask):
            return True
        normalizer = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "normalizer", None)
        if normalizer is None:
            return False
        normalized = normalizer.normalize_str(text)
        return len(self._matches(normalized, 0, len(normalized))) != len(matches)

    def _is_clean(self, ids: list[int], expected: list[int]) -> bool:
        """Whether no control token is in `ids` more often than the template wrote it."""
        return Counter(token for token in ids if token in self._markers) <= Counter(expected)

    def _example(self, text: str, mask: bytes) -> str:
        own = set(self._own_matches(text, mask))
        touching = (text[first:end] for first, end in self._matches(text, 0, len(text)) if (first, end) not in own)
        return next(map(repr, touching), "made by the tokenizer's normalizer")

    def _matches(self, text: str, start: int, end: int) -> list[tuple[int, int]]:
        """Spans of control tokens' spellings in text[start:end]: the leftmost, of those the longest, without overlap."""
        found = []
        while candidate := self._first.search(text, start, end):
            first = candidate.start()
            lengths = (n for n in self._lengths if first + n <= end and text[first : first + n] in self._control)
            length = next(lengths, 0)
            if length:
                found.append((first, first + length))
            start = first + max(length, 1)
        return found


class _RespelledTokenizer:
    """A tokenizer whose control tokens have secret spellings.

    Args:
        inner: of the `tokenizers` library.
        secret: spelling to secret spelling of each control token.
        ids: id in `inner` to id in the checkpoint's tokenizer, of the added tokens for which they differ.
    """

    def __init__(self, inner: Any, secret: dict[str, str], ids: dict[int, int]):
        self._inner = inner
        self._secret = secret
        self._ids = ids

    def encode(self, text: str, own: list[tuple[int, int]]) -> list[int] | None:
        """Token ids. `own`: spans of the control tokens; None if not each of them became one."""
        pieces: list[str] = []
        start = 0
        for first, end in own:
            pieces += (text[start:first], self._secret[text[first:end]])
            start = end
        pieces.append(text[start:])
        found: list[int] = self._inner.encode("".join(pieces), add_special_tokens=False).ids
        spelled = {self._inner.token_to_id(self._secret[text[first:end]]) for first, end in own}
        if sum(token in spelled for token in found) != len(own):
            return None
        return [self._ids.get(token, token) for token in found]


def _secrets(control: dict[str, int]) -> dict[str, str]:
    """A secret spelling for each. All of one length: none begins another. Letters and digits that no normalizer changes."""
    key = secrets.token_hex(16)
    return {text: f"{key}{i:08x}" for i, text in enumerate(control)}


def _sharing_the_model(tokenizer: Any, control: dict[str, int]) -> _RespelledTokenizer | None:
    """Made in milliseconds. Its model can still make a control token of content where that is a word of its vocabulary:
    the caller checks. None if the tokenizer is not of the `tokenizers` library."""
    from tokenizers import AddedToken, Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    secret = _secrets(control)
    inner = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(backend, part) is not None:
            setattr(inner, part, getattr(backend, part))
    added = sorted(backend.get_added_tokens_decoder().items())
    spellings = [secret.get(token.content, token.content) for _, token in added]
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    inner.add_tokens(
        [
            AddedToken(spelling, **{flag: getattr(token, flag) for flag in flags})
            for spelling, (_, token) in zip(spellings, added, strict=True)
        ]
    )
    new: dict[Any, int] = {
        inner.token_to_id(spelling): index
        for spelling, (index, _) in zip(spellings, added, strict=True)
        if backend.model.token_to_id(spelling) is None
    }
    if any(backend.model.id_to_token(there) is not None for there in new):
        return None  # a vocabulary with gaps: a word of the model has the id that a secret was given
    return _RespelledTokenizer(inner, secret, new)


def _with_its_own_model(tokenizer: Any, control: dict[str, int]) -> _RespelledTokenizer | None:
    """Made in seconds. No text but a secret makes a control token in it. None if the tokenizer is not of the
    `tokenizers` library, or its parts depend on a spelling."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    secret = _secrets(control)
    stored = json.loads(backend.to_str())
    _respell(stored, secret)
    try:
        inner = Tokenizer.from_str(json.dumps(stored))
    except Exception:
        logger.warning("control tokens can't be respelled in this tokenizer", exc_info=True)
        return None
    inner.no_truncation()
    inner.no_padding()
    if any(inner.token_to_id(secret[text]) != index for text, index in control.items()):
        return None
    return _RespelledTokenizer(inner, secret, {})


def _respell(stored: dict[str, Any], secret: dict[str, str]) -> None:
    """Change the spelling of tokens, in place, wherever a stored tokenizer names them. Their ids stay."""
    for token in stored["added_tokens"]:
        token["content"] = secret.get(token["content"], token["content"])
    model = stored["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {secret.get(text, text): index for text, index in vocabulary.items()}
    else:
        model["vocab"] = [[secret.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in secret:
        model["unk_token"] = secret[model["unk_token"]]
    if "merges" in model:  # none may lead to a control token, or go on from one
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if secret.keys().isdisjoint((a, b, a + b))]
    stored["post_processor"] = None  # adds begin and end tokens, by their old spelling; the template writes them here


def _unknown_ids(tokenizer: Any, template_text: str) -> frozenset[int]:
    """The id that stands for characters outside the vocabulary, if it is not a control token besides."""
    text = tokenizer.unk_token
    others = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    if text is None or text in others or text in template_text:
        return frozenset()
    return frozenset({tokenizer.unk_token_id})
