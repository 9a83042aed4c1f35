"""Shapes that lie on axes: length, batch and catalogue grow one at a time, from a base where the axes meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ._results import Row

AXES = ("seq_len", "batch", "n_items")
WORDS = {"seq_len": "length {:,}", "batch": "batch {:,}", "n_items": "{:,} items"}


def base_of(rows: Sequence[Row]) -> dict[str, int]:
    """Where the axes of a record meet: of each size the value that most shapes have, the first of equals.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    shapes = dict.fromkeys(tuple(getattr(row, axis) for axis in AXES) for row in rows)
    counts = map(Counter, zip(*shapes, strict=True))
    return {axis: count.most_common(1)[0][0] for axis, count in zip(AXES, counts, strict=True)}


def along(rows: Sequence[Row], base: Mapping[str, int], axis: str) -> list[Row]:
    """The rows that differ from the base in `axis` at most."""
    others = [name for name in AXES if name != axis]
    return [row for row in rows if all(getattr(row, name) == base[name] for name in others)]


def words(base: Mapping[str, int], without: str = "") -> str:
    """The sizes of the base, less the one on axis `without`."""
    return ", ".join(WORDS[name].format(base[name]) for name in AXES if name != without)


def panels(rows: Sequence[Row], base: Mapping[str, int], axes: Sequence[str]) -> list[tuple[str, str, list[Row]]]:
    """For each axis its name, a title that says where the others are, and its measured rows: what `_plot.grid` draws.

    Raises:
        ValueError: there is no measured row.
    """
    timed = [row for row in rows if row.median_ms is not None]
    if not timed:
        raise ValueError("plot: expected at least one measured row, got none")
    return [(axis, words(base, without=axis), along(timed, base, axis)) for axis in axes]
