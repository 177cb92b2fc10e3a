"""Plays transcripts as a model's answers: an engine whose tokens are known, and come in any groups."""

import itertools

from cai_runtime.engine.engine import Engine
from cai_runtime.engine.outbox import deliver
from cai_runtime.engine.request import TokenLogprobs

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

    answers: transcripts, as token ids; choice i of a request gets the i-th, and so on from the first again. sizes: of the
    groups of tokens that come at once, and so on from the first again; None: all tokens at once.
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
        answers = zip(sequences, itertools.cycle(self.answers), strict=False)
        waiting = [(sequence, iter(answer)) for sequence, answer in answers]
        sizes = itertools.cycle(self.sizes or [10**6])
        for sequence in sequences:
            sequence.log.cached_tokens = CACHED
            if sequence.is_scoring:
                sequence.add_prompt_logprobs(logprobs_of(token, 1) for token in sequence.token_ids[1:])
        while waiting:
            size = next(sizes)
            at = size % len(waiting)
            sequence, tokens = waiting[at]
            for token in itertools.islice(tokens, size):
                sequence.append(token)
                if sequence.logprobs is not None:
                    sequence.logprobs.append(logprobs_of(token, sequence.request.sampling.logprobs))
                if sequence.may_end():
                    break
            delta = sequence.put_out()
            assert delta.token_ids, "a transcript that does not end"
            deliver([(sequence.log, delta)])
            if delta.finish_reason is not None:
                del waiting[at]


def logprobs_of(token, top):
    """Made up, different for each token."""
    return TokenLogprobs(token, -token / 1000, tuple((other, -0.5 - other / 1000) for other in range(40, 40 + top)))
