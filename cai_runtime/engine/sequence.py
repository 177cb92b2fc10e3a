"""What the engine knows about one request while it runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cai_runtime.engine.alignment import Aligner
from cai_runtime.engine.cache import Held
from cai_runtime.engine.masks import TokenMask
from cai_runtime.engine.outbox import TokenLog
from cai_runtime.engine.output import Output
from cai_runtime.engine.pooling import Pool
from cai_runtime.engine.request import Delta, Request, TokenLogprobs
from cai_runtime.engine.sampling import SequenceSampler
from cai_runtime.engine.segments import Prompt

if TYPE_CHECKING:
    from cai_runtime.engine.beams import BeamGroup, BeamSampler


@dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it, with what it holds of the caches. Touched by the owner thread only."""

    arrival: int  # smaller is older
    request: Request
    prompt: Prompt
    sampler: SequenceSampler | BeamSampler
    output: Output
    log: TokenLog
    ends: Collection[int] = ()  # tokens that end the text once min_tokens were generated
    mask: TokenMask | None = None
    beam: BeamGroup | None = None  # where it is one of several that search

    token_ids: list[int] = field(init=False)  # prompt, then generated
    num_prompt: int = field(init=False)
    num_computed: int = 0  # positions that the caches have
    seat: int = -1  # in the runner's batch, while it is running; -1: none
    held: Held = field(default_factory=Held)
    num_put_out: int = 0  # generated tokens that the consumer has
    logprobs: list[TokenLogprobs] | None = field(init=False)  # of the generated tokens; None: not wanted
    prompt_logprobs: list[TokenLogprobs | None] | None = field(init=False)  # of the prompt's, as far as they are known
    pool: Pool | None = field(init=False)  # where the embedding of the prompt is wanted
    aligner: Aligner | None = field(init=False)  # where its cross-attention is wanted
    asks_more: bool = field(init=False)  # than tokens: logprobs, or nothing but a prompt
    was_admitted: bool = False
    prompt_digests: list[bytes] = field(default_factory=list)  # of the prompt's full pages; shared by equal prompts
    submitted_at: float = 0.0  # on the engine's clock, as the following
    first_token_at: float | None = None
    last_token_at: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt.token_ids)
        self.num_prompt = len(self.token_ids)
        params = self.request.sampling
        self.logprobs = None if params.logprobs is None else []
        self.prompt_logprobs = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = []
            self.add_prompt_logprobs([None])  # nothing comes before the first token
        pooling = self.request.pooling
        self.pool = None if pooling is None else Pool(pooling, self.num_prompt)
        alignment, encoder = self.request.alignment, self.prompt.encoder
        self.aligner = None
        if alignment is not None and encoder is not None:
            self.aligner = Aligner(alignment, self.num_prompt, encoder.rows)
        scores = self.logprobs is not None or self.prompt_logprobs is not None
        self.asks_more = scores or params.max_tokens == 0 or self.request.beam is not None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be fed before the next one can be sampled: 1 when decoding, more when prefilling."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_reusable(self) -> int:
        """Of so many tokens, all but the last may come from the prefix cache. Rows that are still wanted have to be
        computed."""
        if self.pool is not None:
            return min(self.pool.count + 1, self.num_prompt)
        most = len(self.token_ids if self.prompt_logprobs is None else self.prompt_logprobs)
        return most if self.aligner is None else min(self.aligner.next + 1, most)

    @property
    def is_scoring(self) -> bool:
        """Whether logprobs of prompt tokens are still wanted."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt

    def rows_to_score(self, start: int, end: int) -> int:
        """How many of the positions start to end - 1, the last but for those behind the prompt, have a row of logits that
        says the logprob of a prompt token: the one behind it."""
        if self.prompt_logprobs is None:
            return 0
        return max(min(end, self.num_prompt - 1) - max(start, len(self.prompt_logprobs) - 1), 0)

    def add_prompt_logprobs(self, found: Iterable[TokenLogprobs | None]) -> None:
        """Add those of the prompt's next tokens; after the last one, the consumer gets all."""
        assert self.prompt_logprobs is not None
        self.prompt_logprobs += found
        if not self.is_scoring:
            self.log.prompt_logprobs = tuple(self.prompt_logprobs)

    def may_end(self) -> bool:
        """Whether the newest token ends the text, as far as tokens alone tell."""
        generated, params = self.num_generated, self.request.sampling
        return generated >= params.max_tokens or (self.token_ids[-1] in self.ends and generated >= params.min_tokens)

    def append(self, token_id: int) -> None:
        """Add a generated token. Raises what the mask raises, with the token added."""
        self.token_ids.append(token_id)
        self.sampler.observe(token_id)
        if self.mask is not None and not self.may_end():
            self.mask.accept(token_id)

    def put_out(self) -> Delta:
        """What the consumer sees of the tokens that were appended since the last call.

        The delta says which of them belong to the text, and whether it is over. The token that ends the text counts as
        generated (as in the OpenAI API and vLLM). Tokens behind it are taken back.
        """
        before, most = self.num_put_out, self.request.sampling.max_tokens
        first = self.num_prompt + before
        delta = self.output.feed(self.token_ids[first : self.num_prompt + most])
        self.num_put_out += len(delta.token_ids)
        if delta.finish_reason is None and self.num_put_out >= most:
            rest = self.output.finish()
            delta = Delta(delta.events + rest.events, delta.token_ids, rest.finish_reason, rest.stop_string)
        if delta.finish_reason is not None:
            del self.token_ids[self.num_prompt + self.num_put_out :]
        if self.logprobs is not None:
            delta = replace(delta, logprobs=tuple(self.logprobs[before : self.num_put_out]))
        return delta
