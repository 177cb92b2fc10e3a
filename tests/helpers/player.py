"""Plays transcripts as a model's answers: an engine whose tokens are known, and come in any groups."""

import itertools

from cai_runtime.engine.engine import Engine
from cai_runtime.engine.outbox import deliver
from cai_runtime.engine.request import TokenLogprobs
from cai_runtime.engine.sequence import Sequence

CACHED = 3  # prompt tokens that every request finds in the prefix cache


class NoModel:
    """A runner that is never asked to run."""

    page_size, num_pages, max_context = 16, 512, 8192

    def __init__(self, tokenizer):
        self.vocab_size = len(tokenizer)

    def run(self, step):
        raise AssertionError("the player answers every request")

    def close(self):
        pass


class Player:
    """Answers requests in the engine's place. An answer goes the engine's own way, from the token on.

    answers: transcripts, as token ids, or sequences that were generated; choice i of a request gets the i-th, and so on
    from the first again. sizes: of the groups of tokens that come at once, and so on from the first again; None: all tokens
    at once. Logprobs are those of the sequence, or made up.
    """

    def __init__(self, engine):
        self.engine = engine
        self.answers, self.sizes = [], None
        engine._loop.send_requests = self.play

    @classmethod
    def of(cls, tokenizer, ends):
        """With an engine of its own. ends: tokens that end a text."""
        return cls(Engine(NoModel(tokenizer), tokenizer, eos_token_ids=ends))

    def play(self, sequences):
        waiting = [_Playing(*both) for both in zip(sequences, itertools.cycle(self.answers), strict=False)]
        sizes = itertools.cycle(self.sizes or [10**6])
        while waiting:
            size = next(sizes)
            at = size % len(waiting)
            delta = waiting[at].put_out(size)
            deliver([(waiting[at].sequence.log, delta)])
            if delta.finish_reason is not None:
                del waiting[at]


class _Playing:
    """A sequence that gets the tokens of an answer."""

    def __init__(self, sequence, answer):
        self.sequence = sequence
        tokens = answer.token_ids[answer.num_prompt :] if isinstance(answer, Sequence) else answer
        if sequence.logprobs is None:
            known = [None] * len(tokens)
        elif isinstance(answer, Sequence):
            known = answer.logprobs
        else:
            known = [logprobs_of(token, sequence.request.sampling.logprobs) for token in tokens]
        self._left = zip(tokens, known, strict=True)
        sequence.log.cached_tokens = CACHED
        if sequence.is_scoring:
            of = isinstance(answer, Sequence)
            sequence.add_prompt_logprobs(
                answer.prompt_logprobs[1:] if of else [logprobs_of(token, 1) for token in sequence.token_ids[1:]]
            )

    def put_out(self, size):
        """The delta of so many tokens, or of fewer, where the text may end before."""
        for token, known in itertools.islice(self._left, size):
            self.sequence.append(token)
            if known is not None:
                self.sequence.logprobs.append(known)
            if self.sequence.may_end():
                break
        delta = self.sequence.put_out()
        assert delta.token_ids or delta.finish_reason, "an answer that does not end"
        return delta


def logprobs_of(token, top):
    """Made up, different for each token."""
    return TokenLogprobs(token, -token / 1000, tuple((other, -0.5 - other / 1000) for other in range(40, 40 + top)))
