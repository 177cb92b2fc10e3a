"""An open model: its engine, and what the API needs beside it."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cai_runtime.api.errors import BadRequestError
from cai_runtime.formats.base import Format
from cai_runtime.formats.find import find_format
from cai_runtime.formats.infill import Infill
from cai_runtime.formats.media import Fetcher
from cai_runtime.grammars import Grammars
from cai_runtime.scalars import shown
from cai_runtime.slim.embedding_files import EmbeddingFiles
from cai_runtime.slim.generation_defaults import GenerationDefaults
from cai_runtime.speech.prompts import SpeechText
from cai_runtime.speech.tokens import SpeechTokens


@dataclass
class OpenModel:
    """An engine and what the API needs beside it. One for each directory, under whatever names it is asked for.

    `defaults`: the sampling parameters of requests that name none. `process`: where it was opened. `path`: of the
    checkpoint.
    `format_name`: of its conversations; None: found by its files. `fetcher`: of images and audio at http(s) addresses.
    """

    engine: Any
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    tokenizer_lock: threading.Lock = field(default_factory=threading.Lock)  # a tokenizer is not for several threads
    process: int = field(default_factory=os.getpid)
    path: Path | None = None
    format_name: str | None = None
    fetcher: Fetcher | None = None

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    @property
    def ended(self) -> bool:
        """Whether the engine was closed, or ended by an error of its own, so that the model has to be opened again. Not
        in a forked child, where the engine itself says what to do."""
        return not self.engine.alive and self.process == os.getpid()

    @cached_property
    def format(self) -> Format:
        """How this model converses. Found at the first chat; hold `tokenizer_lock`."""
        return find_format(self.tokenizer, self.format_name)

    @cached_property
    def infill(self) -> Infill | None:
        """How this model writes between two texts; None if it does not. Hold `tokenizer_lock`."""
        return Infill.find(self.tokenizer)

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles what answers must be. Thread-safe; without `tokenizer_lock`."""
        return Grammars(self.tokenizer, self.engine.vocab_size, self.engine.eos_token_ids)

    @cached_property
    def embedding_files(self) -> EmbeddingFiles | None:
        """How this model makes embeddings, by its files; None if they don't say. Raises CheckpointError or
        UnsupportedModelError."""
        return None if self.path is None else EmbeddingFiles.read(self.path)

    @cached_property
    def speech_tokens(self) -> SpeechTokens:
        """The control tokens of a model that transcribes. Raises CheckpointError."""
        assert self.path is not None
        return SpeechTokens.from_checkpoint(self.path)

    @cached_property
    def speech_text(self) -> SpeechText:
        """Its text to tokens and back."""
        return SpeechText(self.tokenizer, self.speech_tokens)

    def require_head(self, name: str) -> None:
        """Refuse to write text with a model that has no language-model head. name: as the request names it."""
        if not self.engine.has_head:
            raise BadRequestError(
                f"The model {shown(name)} can't write text: it has no language-model head, and lacks the capability "
                "'support_chat_completion'. It makes embeddings: client.embeddings.create.",
                param="model",
                code="chat_not_supported",
            )

    @cached_property
    def longest_token(self) -> int | None:
        """Characters of the vocabulary's longest entry; None if the tokenizer does not tell."""
        try:
            return max(map(len, self.tokenizer.get_vocab()), default=None)
        except (AttributeError, NotImplementedError, TypeError):
            return None

    def check_characters(self, count: int, param: str) -> None:
        """Refuse a prompt that can't fit by its characters alone: tokenizing megabytes takes seconds, in which the
        model's other requests wait.

        Args:
            count: characters of the prompt.
            param: the parameter that it came in.
        """
        context = self.engine.max_context
        if count > 2 * context and self.longest_token and count > self.longest_token * context:
            raise BadRequestError(
                f"The prompt has {count} characters, more than {context} tokens can stand for, which is what fits "
                "here, the answer included: shorten the prompt.",
                param=param,
                code="context_length_exceeded",
            )
