"""What the engine knows about one request while it runs."""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass, field

from cai_runtime.engine.outbox import TokenLog
from cai_runtime.engine.output import Output
from cai_runtime.engine.request import Delta, Request
from cai_runtime.engine.sampling import SequenceSampler


@dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it, with its pages. Touched by the owner thread only."""

    arrival: int  # smaller is older
    request: Request
    sampler: SequenceSampler
    output: Output
    log: TokenLog

    token_ids: list[int] = field(init=False)  # prompt, then generated
    num_computed: int = 0  # positions whose KV is in `pages`
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the full pages of token_ids; see kv_cache
    num_registered: int = 0  # pages offered to the prefix cache
    was_admitted: bool = False
    prompt_digests: list[bytes] = field(default_factory=list)  # of the prompt's full pages; shared by equal prompts
    submitted_at: float = 0.0  # on the engine's clock, as the following
    first_token_at: float | None = None
    last_token_at: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be fed before the next one can be sampled: 1 when decoding, more when prefilling."""
        return len(self.token_ids) - self.num_computed

    def accept(self, token_ids: collections.abc.Sequence[int]) -> Delta:
        """Append generated tokens, which are final; return what the consumer sees of them.

        The delta says which of them belong to the text, and whether it is over. The token that ends the text counts as
        generated (as in the OpenAI API and vLLM).
        """
        most = self.request.sampling.max_tokens
        delta = self.output.feed(token_ids[: most - self.num_generated])
        self.token_ids += delta.token_ids
        for token_id in delta.token_ids:
            self.sampler.observe(token_id)
        if delta.finish_reason is None and self.num_generated >= most:
            rest = self.output.finish()
            delta = Delta(delta.events + rest.events, delta.token_ids, rest.finish_reason, rest.stop_string)
        return delta
