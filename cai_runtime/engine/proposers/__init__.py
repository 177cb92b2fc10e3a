"""Drafts for speculative decoding (Leviathan et al. 2023): guesses at the next tokens, which one step of the model checks.

A token is a function of the logits, the parameters, the seed and its position (kernels/sampling.py). So each row behind a
drafted token is sampled as if the draft were the text, and the draft holds as far as it is what was sampled: the text is
the undrafted one, bit for bit, also at a temperature. No draft is accepted by chance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cai_runtime.errors import EngineError

if TYPE_CHECKING:
    from cai_runtime.engine.sequence import Sequence


class Proposer(Protocol):
    """Guesses how texts go on. Called by the engine's thread, for each decoding sequence before each of its steps."""

    def propose(self, sequence: Sequence) -> list[int]:
        """The tokens that may follow `sequence.token_ids`, in order; none where it does not know. Must not change the
        sequence."""
        ...


def checked_draft(proposer: Proposer, sequence: Sequence, vocab_size: int) -> list[int]:
    """What is proposed, as far as the request may still have tokens: one is sampled behind the last of a draft.

    Raises EngineError for an id outside the vocabulary."""
    room = sequence.request.sampling.max_tokens - sequence.num_generated - 1
    draft = list(proposer.propose(sequence))[: max(room, 0)]
    for token_id in draft:
        if not 0 <= token_id < vocab_size:
            name = type(proposer).__name__
            raise EngineError(f"{name} proposed token id {token_id}; the vocabulary is 0..{vocab_size - 1}")
    return draft
