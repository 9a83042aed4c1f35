"""Rows as a table for people: the columns that a script chooses, the peer of the ratios, and what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ._results import EVERYTHING, Row, aligned, fastest_sasrec, shape_of


@dataclass(frozen=True)
class Column:
    """A header, and the cell of a row among all rows."""

    header: str
    cell: Callable[[Row, Sequence[Row]], str]
    left: bool = False


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _range(row: Row, rows: Sequence[Row]) -> str:
    return "" if row.p20_ms is None else f"{_ms(row.p20_ms)}-{_ms(row.p80_ms)}"


def _ms(value: float | None) -> str:
    """Three digits are more than a time on a busy machine is worth."""
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(row: Row, rows: Sequence[Row]) -> str:
    peer = fastest_sasrec(rows, row)
    return "" if peer is None or not peer.median_ms or not row.median_ms else f"{row.median_ms / peer.median_ms:.2f}"


def _processor_ratio(row: Row, rows: Sequence[Row]) -> str:
    """As `_ratio`, of processor times, which other work on the machine disturbs less."""
    times = [one.cpu_ms for one in rows if one.model == "sasrec" and one.cpu_ms and shape_of(one) == shape_of(row)]
    return f"{row.cpu_ms / min(times):.2f}" if row.cpu_ms and times else ""


def _memory_ratio(row: Row, rows: Sequence[Row]) -> str:
    peer = least_memory(rows, row)
    return "" if not peer or row.peak_mem_mb is None else f"{row.peak_mem_mb / peer:.2f}"


def least_memory(rows: Sequence[Row], row: Row) -> float | None:
    """The smallest peak of a SASRec of the same shape, phase, dtype and positions of the loss."""

    def what(other: Row) -> tuple[object, ...]:
        return other.phase, other.batch, other.seq_len, other.n_items, other.dtype, other.positions

    peaks = [other.peak_mem_mb for other in rows if other.model == "sasrec" and what(other) == what(row)]
    return min((peak for peak in peaks if peak is not None), default=None)


def _bound(row: Row, rows: Sequence[Row]) -> str:
    return "" if row.bound_share is None else f"{row.bound_share:4.0%} of {row.bound}"


COLUMNS = {
    "model": Column("model", lambda row, _: row.model, left=True),
    "impl": Column("computed by", lambda row, _: row.impl, left=True),
    "mode": Column("mode", lambda row, _: row.mode, left=True),
    "dtype": Column("dtype", lambda row, _: row.dtype, left=True),
    "phase": Column("phase", lambda row, _: row.phase, left=True),
    "positions": Column("loss at", lambda row, _: row.positions or "", left=True),
    "batch": Column("batch", lambda row, _: str(row.batch)),
    "seq_len": Column("len", lambda row, _: str(row.seq_len)),
    "n_items": Column("items", lambda row, _: f"{row.n_items:,}"),
    "ms": Column("ms / batch", lambda row, _: _ms(row.median_ms)),
    "range": Column("(20-80 %)", _range),
    "cpu_ms": Column("CPU ms", lambda row, _: _ms(row.cpu_ms)),
    "sequences": Column("seq/s", lambda row, _: _number(row.sequences_per_s, ",.0f")),
    "ratio": Column("x SASRec", _ratio),
    "cpu_ratio": Column("x in CPU ms", _processor_ratio),
    "peak": Column("peak MB", lambda row, _: _number(row.peak_mem_mb, ",.1f")),
    "state": Column("state MB", lambda row, _: _number(row.state_mb, ",.1f")),
    "memory_ratio": Column("x SASRec", _memory_ratio),
    "bound": Column("bound", _bound, left=True),
}
RATIOS = ("ms", "range", "cpu_ms", "ratio", "cpu_ratio")
TIMES = ("model", "impl", "mode", "dtype", "batch", "seq_len", *RATIOS, "sequences", "peak", "bound")


def table(rows: Sequence[Row], columns: Sequence[str] = TIMES) -> str:
    """Measured rows as aligned text, then the peer of each shape, then the reasons why others are missing.

    A column that would be empty is left out.
    """
    measured = [row for row in rows if row.skipped is None]
    cells = {name: [COLUMNS[name].cell(row, rows) for row in measured] for name in columns}
    chosen = [COLUMNS[name] for name in columns if any(cells[name])]
    lines = [[column.header for column in chosen]]
    lines += [list(line) for line in zip(*(cells[name] for name in columns if any(cells[name])), strict=True)]
    if not measured:
        return "\n".join(["nothing was measured", *_missing(rows)])
    text = aligned(lines, left={place for place, column in enumerate(chosen) if column.left})
    if "ratio" in columns:
        text += _peers(measured)
    return "\n".join([*text, *_missing(rows)])


def _peers(rows: Sequence[Row]) -> list[str]:
    """What the column of ratios divides by: one line for each shape."""
    lines = []
    for row in rows:
        peer = fastest_sasrec(rows, row)
        if peer is not None:
            where = f"batch {peer.batch}, length {peer.seq_len}, {peer.n_items:,} items"
            what = ", ".join(part for part in (peer.impl, peer.mode, peer.dtype) if part)
            lines.append(f"x SASRec, {where}: against {what}: {_ms(peer.median_ms)} ms")
    return list(dict.fromkeys(lines))


def _missing(rows: Sequence[Row]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.skipped is not None:
            what = f"all of {row.model}" if row.impl == EVERYTHING else f"{row.model} {row.impl} {row.mode}"
            reasons.setdefault(row.skipped, []).append(what)
    return [f"skipped: {reason}: {_counted(what)}" for reason, what in reasons.items()]


def _counted(labels: Sequence[str]) -> str:
    counts = {label: labels.count(label) for label in labels}
    return ", ".join(label if count == 1 else f"{label} ({count} times)" for label, count in counts.items())
