"""Rows of models as multiples of the best SASRec's of the same shape, and what is said beside such a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import _results
from bench._sections._record import Record, Row, paragraph

Shape = tuple[Any, ...]
ShapeOf = Callable[[Row], Shape]


def lines(rows: Sequence[Row], shapes: Sequence[Shape], shape_of: ShapeOf, field: str = "median_ms") -> list[list[str]]:
    """A line for each model and implementation, a cell for each shape; empty where something was not measured."""
    best = {shape: _best_sasrec(rows, shape, shape_of, field) for shape in shapes}
    found = []
    for name in dict.fromkeys((row["model"], row["impl"]) for row in rows):
        own = [row for row in rows if (row["model"], row["impl"]) == name]
        cells = (_cell([row for row in own if shape_of(row) == shape], best[shape], field) for shape in shapes)
        found.append([*name, *cells])
    return found


def _best_sasrec(rows: Sequence[Row], shape: Shape, shape_of: ShapeOf, field: str) -> float | None:
    return min((row[field] for row in rows if row["model"] == "sasrec" and shape_of(row) == shape), default=None)


def _cell(rows: Sequence[Row], best: float | None, field: str) -> str:
    row = min(rows, key=lambda row: row[field], default=None)
    if row is None or best is None:
        return ""
    words = [row["mode"]] * (row["mode"] != "eager") + ["bf16"] * (row["dtype"] == "bfloat16")
    return " ".join([f"{row[field] / best:.2f}", *words])


def terms(rows: Sequence[Row]) -> str:
    """What the multiples are of, and which rows are shown."""
    states = " or ".join(str(n) for n in sorted({row["d_state"] for row in rows if row["d_state"]}))
    return (
        f"as a multiple of the best SASRec's of the same shape in the same run, N={states}, each in its best mode and "
        "dtype; lower is better."
    )


def noise(rows: Sequence[Row]) -> str:
    """How wide the bands are: what a reader may take the digits for."""
    widths = sorted(row["p80_ms"] / row["p20_ms"] for row in rows if row.get("p20_ms"))
    if not widths:
        return ""
    return paragraph(
        f"The 80 % quantile of a row's samples is {widths[len(widths) // 2]:.2f} times the 20 % quantile in the median "
        f"row, and {widths[-1]:.2f} times in the noisiest one: differences smaller than that are noise."
    )


def typed(rows: Sequence[Row]) -> list[_results.Row]:
    """The rows as figures want them."""
    names = {field.name for field in dataclasses.fields(_results.Row)}
    return [_results.Row(**{name: value for name, value in row.items() if name in names}) for row in rows]


def figure_name(record: Record) -> str:
    """Of the script's figure in docs/, for the record's device."""
    return f"{record.script.replace('_', '-')}-{Path(record.path).parent.name}.png"


def figure_title(record: Record, title: str) -> str:
    return f"{title}: {record.head['device']}, torch {record.head['torch']}"
