"""Text between a prefix and a suffix, by the tokens that some models of code were trained with (Bavarian et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cai_runtime.errors import ConversationError
from cai_runtime.formats.control_tokens import PromptEncoder, control_tokens
from cai_runtime.formats.traced_text import content, own

# What stands before the prefix, before the suffix, and before the text between them.
_TRIPLES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)
# What ends the text between, besides the model's own end of text: the file ends, or begins anew.
_ENDS = (
    "<|endoftext|>", "<|fim_pad|>", "<fim_pad>", "▁<EOT>", "<|file_sep|>", "<file_sep>", "<|file_separator|>",
    "<|repo_name|>", "<reponame>",
)  # fmt: skip


class Infill:
    """How a model is asked for the text between two others. Not for several threads at once, like the tokenizer.

    ends: tokens that end that text.
    """

    def __init__(self, tokenizer: Any, triple: tuple[str, str, str]):
        control = control_tokens(tokenizer)
        self._triple, self._first = triple, control[triple[0]]
        self._encoder = PromptEncoder(tokenizer)
        bos = tokenizer.bos_token_id
        self._start = [bos] if bos is not None and list(tokenizer.encode("", verbose=False))[:1] == [bos] else []
        self.ends = tuple(control[text] for text in (*triple, *_ENDS) if text in control)

    @classmethod
    def find(cls, tokenizer: Any) -> Infill | None:
        """That of a tokenizer whose added tokens hold those of a family; else None."""
        control = control_tokens(tokenizer)
        triples = (triple for triple in _TRIPLES if all(text in control for text in triple))
        return next((cls(tokenizer, triple) for triple in triples), None)

    def encode(self, prefix: str | Sequence[int], suffix: str) -> list[int]:
        """The prompt behind which the text between begins. Control tokens that the texts spell stay text; token ids are
        taken as they are.

        Raises:
            ConversationError: a text spells a control token, and this tokenizer can't take that as text.
        """
        before, after, between = map(own, self._triple)
        rest = after + content(suffix) + between
        try:
            if isinstance(prefix, str):
                return self._start + self._encoder.encode(before + content(prefix) + rest)
            return [*self._start, self._first, *prefix, *self._encoder.encode(rest)]
        except ConversationError as error:
            raise ConversationError(
                "The prompt or the suffix holds the spelling of a control token, and this model's tokenizer can't take it "
                "as text: leave it out.",
                param="suffix",
            ) from error
