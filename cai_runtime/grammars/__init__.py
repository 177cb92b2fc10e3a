"""Constrained decoding: grammars compiled by llguidance into token masks. Light to import; llguidance is imported when the
first grammar is compiled.

A grammar is in llguidance's dialect of Lark (its docs/syntax.md), with a rule `start`. `expressions` makes pieces of such
grammars of JSON schemas, regular expressions, lists of choices and users' own grammars; `Grammars` compiles a whole one for
a model. The end of the text is allowed exactly where the grammar may end: there every token may come that ends the request's
text (the model's end-of-text tokens unless `ignore_eos`, `stop_token_ids`, stop strings that are special tokens). Elsewhere
such a token may come only where the grammar allows it as what it is. Stop strings know nothing of the grammar: a text that
ends at one may lack the rest. `min_tokens` bans the ends until then, so a grammar that is complete before that fails.
"""

from cai_runtime.grammars.compiler import Grammars

__all__ = ["Grammars"]
