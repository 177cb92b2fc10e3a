"""Random texts under a grammar: what constrained decoding of a model that knows nothing would write."""

import random

import numpy as np

COMMON = '"}]),:<[{\n0'  # characters that texts with structure need to come to their end


class Writer:
    """Writes tokens that a grammar allows.

    Args:
        grammars: of the tokenizer.
        markers: spellings that a text goes on with, once it has begun them: else none would end.
    """

    def __init__(self, tokenizer, grammars, markers):
        self.grammars, self.markers, self.end = grammars, markers, tokenizer.eos_token_id
        self.words = -(-len(tokenizer) // 32)
        self.texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
        added = set(tokenizer.added_tokens_decoder)
        self.ids = {text: i for i, text in enumerate(self.texts) if len(text) == 1 and i not in added}
        self.weights = np.ones(len(tokenizer))
        for token, text in enumerate(self.texts):
            if token in added:
                self.weights[token] = 25
            elif text in COMMON:
                self.weights[token] = 12
            elif not text.isprintable() or "\ufffd" in text:
                self.weights[token] = 0.02

    def text(self, lark, seed, limit=500):
        """Token ids, the end's included; None where the text has not ended within the limit."""
        rng, mask = random.Random(seed), self.grammars.mask(lark)((self.end,))
        tokens, text = [], ""
        while len(tokens) < limit:
            row = np.full(self.words, 0xFFFFFFFF, np.uint32)
            mask.fill(row)
            allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")[: len(self.texts)])
            assert len(allowed), f"a dead end after {text!r}"
            token = self._next(rng, allowed, text)
            tokens.append(token)
            if token == self.end:
                return tokens
            mask.accept(token)
            text = (text + self.texts[token])[-40:]
        return None

    def _next(self, rng, allowed, text):
        if self.end in allowed and rng.random() < 0.5:
            return self.end
        begun = [self.ids[m[k]] for m in self.markers for k in range(1, len(m)) if text.endswith(m[:k])]
        if rng.random() < 0.93 and (going_on := [token for token in begun if token in allowed]):
            return rng.choice(going_on)
        return int(rng.choices(allowed, self.weights[allowed])[0])
