"""What the decoder is given before a window's transcript: previous text, the start of the transcript, a prefix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cai_runtime.errors import TranscriptionError
from cai_runtime.speech.options import Options
from cai_runtime.speech.tokens import SpeechTokens

_SPLIT = re.compile(r"(?<=<)(?=\|)")  # inside what a control token would begin with


class SpeechText:
    """Text to tokens and back, for one checkpoint. Thread-safe as the tokenizer under it is.

    tokenizer: a `tokenizers.Tokenizer`, or one of transformers. tokens: the checkpoint's control tokens.
    """

    def __init__(self, tokenizer: Any, tokens: SpeechTokens):
        self._backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._eot = tokens.eot

    def encode(self, text: str) -> list[int]:
        """Text tokens alone: what is spelled like a control token is text, in pieces."""
        ids: list[int] = []
        for piece in _SPLIT.split(text):
            found = self._backend.encode(piece, add_special_tokens=False)
            ids += found if isinstance(found, list) else found.ids
        return [token for token in ids if token < self._eot]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the text tokens among these; no timestamps, no control tokens."""
        text = [token for token in token_ids if token < self._eot]
        return self._backend.decode(text, skip_special_tokens=True) if text else ""


@dataclass(frozen=True)
class WindowPrompt:
    """ids: all tokens before the transcript. sot: where <|startoftranscript|> stands among them. lead: the tokens at the
    end of `ids` that belong to the transcript, a prefix."""

    ids: tuple[int, ...]
    sot: int
    lead: tuple[int, ...] = ()

    @property
    def begin(self) -> tuple[int, ...]:
        """The tokens up to <|startoftranscript|>, behind which stands whether there is speech, and in what language."""
        return self.ids[: self.sot + 1]


class Prompts:
    """Makes the prompts of a file's windows.

    Previous text takes half of the decoder's positions at most, as in OpenAI's: hotwords first, then the end of the text.
    A prefix takes a quarter at most, so that something is left for the transcript.
    """

    def __init__(self, tokens: SpeechTokens, options: Options, text: SpeechText):
        self._tokens, self._options, self._text = tokens, options, text
        self._most = tokens.max_context // 2 - 1
        self._hotwords = self._encode(options.hotwords)[: self._most]
        self._prefix = self._encode(options.prefix)[: tokens.max_context // 4]
        if isinstance(options.initial_prompt, tuple):
            self.initial = list(options.initial_prompt)
            if any(token >= tokens.eot for token in self.initial):
                raise TranscriptionError("initial_prompt has ids that are no text tokens", param="initial_prompt")
        else:
            self.initial = self._encode(options.initial_prompt)

    def _encode(self, words: str | None) -> list[int]:
        """Words as they stand in a transcript, behind a space."""
        return self._text.encode(" " + words.strip()) if words and words.strip() else []

    def window(self, start: Sequence[int], previous: Sequence[int], *, first: bool) -> WindowPrompt:
        """The prompt of a window.

        start: <|startoftranscript|>, language and task. previous: tokens of the text before it, timestamps among them.
        first: whether it is the file's first window, which the prefix belongs to.
        """
        tokens, options = self._tokens, self._options
        prefix = self._prefix if first else []
        room = self._most - len(self._hotwords)
        before = [*self._hotwords, *(previous[-room:] if room else ())]
        ids = [tokens.sot_prev, *before] if before else []
        sot = len(ids)
        ids += start
        if options.without_timestamps:
            ids.append(tokens.no_timestamps)
        lead = tuple(prefix)
        if prefix and not options.without_timestamps:
            lead = (tokens.timestamp_begin, *prefix)
        return WindowPrompt((*ids, *lead), sot, lead)
