"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(table: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Lines of a table whose columns are padded to one width; those in `right` are flush right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def figure(value: float | None, digits: int = 1) -> str:
    """A number for a table; "-" for None."""
    return "-" if value is None else f"{value:,.{digits}f}"
