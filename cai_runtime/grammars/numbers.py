"""Numbers in JSON schemas. llguidance has them in double precision, and some as 64-bit integers: what these can't hold would
be enforced as another number, and integers near -2^63 overflow its stack, which ends the process."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

EXACT = 2**53  # up to here a double holds every integer
LARGEST = 2**62  # bounds beyond it are made tighter
MAX_MULTIPLE = 100_000  # of `multipleOf`, without trailing zeros: a mask has a state for each remainder


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def inexact_number(value: Any) -> int | float | None:
    """A number in a JSON value that may not be kept exactly; None if there is none."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, list):
            left += found
        elif isinstance(found, dict):
            left += found.values()
        elif is_number(found) and abs(found) > EXACT:
            return found
    return None


def exact_bound(value: int | float, *, is_lower: bool) -> int | float | None:
    """A bound that a double holds: the same, or the next tighter one. None: it leaves only numbers beyond LARGEST."""
    if abs(value) <= EXACT:
        return value
    away = value > 0 if is_lower else value < 0  # from zero is where tighter bounds lie
    if abs(value) > LARGEST:
        return None if away else LARGEST if value > 0 else -LARGEST
    near = float(value)
    if near < value if is_lower else near > value:
        near = math.nextafter(near, math.inf if is_lower else -math.inf)
    return int(near)


def common_multiple(steps: Iterable[int | float]) -> int:
    """The least number that all are factors of, in units of their last decimal place, without trailing zeros. Positive."""
    decimals = [Decimal(str(step)).normalize() for step in steps]
    last = min(int(number.as_tuple().exponent) for number in decimals)
    whole = math.lcm(*(int(number.scaleb(-last)) for number in decimals))
    while whole and whole % 10 == 0:
        whole //= 10
    return whole
