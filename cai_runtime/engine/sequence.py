"""What the engine knows about one request while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from cai_runtime.engine.detokenizer import Detokenizer, StopStrings
from cai_runtime.engine.handle import Stream
from cai_runtime.engine.request import Delta, FinishReason, Request
from cai_runtime.engine.sampler import SequenceSampler


@dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it, with its pages. Touched by the owner thread only."""

    arrival: int  # smaller is older
    request: Request
    stop_ids: frozenset[int]  # tokens that end the text
    sampler: SequenceSampler
    detokenizer: Detokenizer
    stop_strings: StopStrings
    stream: Stream

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

    def accept(self, token_id: int) -> Delta:
        """Append a sampled token; return what the consumer sees of it. The delta says whether the text is over.

        The token that ends the text counts as generated (as in the OpenAI API and vLLM) but has no text.
        """
        params = self.request.sampling
        self.token_ids.append(token_id)
        self.sampler.observe(token_id)
        may_stop = self.num_generated >= params.min_tokens
        reason: FinishReason | None = None
        stop_string = None
        if token_id in self.stop_ids and may_stop:
            reason, text = "stop", ""
        else:
            text, stop_string = self.stop_strings.feed(self.detokenizer.feed(token_id), may_stop=may_stop)
            if stop_string is not None:
                reason = "stop"
            elif self.num_generated >= params.max_tokens:
                reason = "length"
        if reason is not None and stop_string is None:
            # What was held back as an unfinished character may still complete a stop string.
            rest, stop_string = self.stop_strings.feed(self.detokenizer.finish(), may_stop=may_stop)
            text += rest
            if stop_string is not None:
                reason = "stop"
            else:
                text += self.stop_strings.finish()
        return Delta(text, (token_id,), reason, stop_string)
