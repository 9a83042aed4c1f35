"""How cost grows with length, batch and catalogue, against the fastest SASRec of the same shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import _axes, _plot, _results
from bench._sections import _ratios
from bench._sections._record import Record, Row, paragraph, table, timed

MOST_SHAPES = 10  # columns of a table, beside the two that name a row
HEADS = _axes.WORDS | {"seq_len": "L={}"}


def render(records: Sequence[Record], docs: Path) -> str:
    """A table and a figure for each device."""
    return "\n\n".join(_of(record, docs) for record in records if record.script == "scaling" and timed(record))


def _of(record: Record, docs: Path) -> str:
    base = _axes.base_of(_ratios.typed(record.rows))
    rows = timed(record)
    measured = _ratios.typed(rows)
    values = {axis: _values(measured, base, axis) for axis in _axes.AXES}
    shown = _thinned(values, base)
    columns = _columns(shown, base)
    left_out = [HEADS[axis].format(value) for axis in shown for value in values[axis] if value not in shown[axis]]
    text = paragraph(
        f"**Scaling**: ids in, top 10 out; time per batch {_ratios.terms(rows)} One size grows at a time: a column "
        f"that names one has the others at {_axes.words(base)}.{_said('Left to the figure', left_out)}"
        f"{_said('No time was left to compile SASRec at', _uncompiled(record.rows, columns))} {record.origin()}"
    )
    lines = _ratios.lines(rows, list(columns.values()), _shape)
    grown = [axis for axis in _axes.AXES if len(values[axis]) > 1] or _axes.AXES[:1]
    name = _ratios.figure_name(record)
    _plot.grid(docs / name, _axes.panels(measured, base, grown), "median_ms", _ratios.figure_title(record, "Scaling"))
    figure = f"![Scaling: every model, implementation and mode, one size growing at a time](docs/{name})"
    header = ["model", "computed by", *columns]
    return "\n\n".join(filter(None, [text, table(header, lines), _ratios.noise(rows), figure]))


def _shape(row: Row) -> tuple[int, ...]:
    return tuple(row[axis] for axis in _axes.AXES)


def _values(rows: Sequence[_results.Row], base: Mapping[str, int], axis: str) -> list[int]:
    return sorted({getattr(row, axis) for row in _axes.along(rows, base, axis)})


def _thinned(values: Mapping[str, Sequence[int]], base: Mapping[str, int]) -> dict[str, list[int]]:
    """The values of each axis that a table has room for; the ends of an axis and the base always stay.

    While there are too many, the axis with the most values loses the one whose neighbours are closest in ratio.
    """
    kept = {axis: list(own) for axis, own in values.items()}
    while len(_columns(kept, base)) > MOST_SHAPES:
        axis = max(kept, key=lambda name: len(kept[name]))
        own = kept[axis]
        inner = [place for place in range(1, len(own) - 1) if own[place] != base[axis]]
        del own[min(inner, key=lambda place: own[place + 1] / own[place - 1])]
    return kept


def _columns(values: Mapping[str, Sequence[int]], base: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape below each head: the base, which lies on every axis, once and first, then axis after axis."""
    found = {}
    if any(base[axis] in own for axis, own in values.items()):
        found[", ".join(HEADS[axis].format(base[axis]) for axis in _axes.AXES)] = _shape(base)
    for axis, own in values.items():
        for value in own:
            if value != base[axis]:
                found[HEADS[axis].format(value)] = _shape({**base, axis: value})
    return found


def _uncompiled(rows: Sequence[Row], columns: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The columns whose baseline did not get its best chance."""
    own = [row for row in rows if row["model"] == "sasrec" and "compiled" in row["mode"]]
    late = {_shape(row) for row in own if "--budget-seconds" in (row.get("skipped") or "")}
    late -= {_shape(row) for row in own if row.get("median_ms") is not None}
    return [head for head, shape in columns.items() if shape in late]


def _said(what: str, heads: Sequence[str]) -> str:
    return f" {what}: {'; '.join(heads)}." if heads else ""
