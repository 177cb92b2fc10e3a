"""Which tokens may come next: the seam for grammars, timestamp rules and the like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np


class TokenMask(Protocol):
    """The allowed next tokens of one sequence. Lies beside its `Output`; called by one thread at a time."""

    def fill(self, row: np.ndarray) -> bool:
        """Clear the bits of the tokens that may not come next. `row`: uint32 [ceil(vocabulary / 32)], all set; token t is
        bit t % 32 of word t // 32. False: every token is allowed, and `row` was left as it is."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on by a token, which `fill` allowed."""
        ...

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens: those of a draft that was not taken."""
        ...


MaskFactory = Callable[[], TokenMask]
