"""Models against the fastest SASRec of the same shape: latency, throughput, training step, peak memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import _plot
from bench._sections import _ratios
from bench._sections._record import Record, Row, paragraph, table

MOST_SHAPES = 9  # columns of a table


@dataclass(frozen=True)
class Kind:
    """What a script measures: `field` of its rows, less is better."""

    title: str
    what: str
    field: str = "median_ms"


KINDS = {
    "latency": Kind("Latency", "ids in, top 10 of {items} items out; time"),
    "throughput": Kind("Throughput", "ids in, top 10 of {items} items out; time per batch"),
    "train_step": Kind("Training step", "forward, backward and Adam, {items} items; time"),
    "memory": Kind("Peak memory", "on top of the weights, {items} items; bytes", "peak_mem_mb"),
}


def render(records: Sequence[Record], docs: Path) -> str:
    """A table and a figure for each script and device."""
    parts = [_of(record, KINDS[script], docs) for script in KINDS for record in records if record.script == script]
    return "\n\n".join(filter(None, parts))


def _of(record: Record, kind: Kind, docs: Path) -> str:
    rows = [row for row in record.rows if row.get(kind.field) is not None]
    if not rows:
        return ""
    shapes = sorted({_shape(row) for row in rows})[:MOST_SHAPES]
    lines = _ratios.lines(rows, shapes, _shape, kind.field)
    header = ["model", "computed by", *(f"{phase}L={length}, batch {batch}" for phase, length, batch in shapes)]
    items = " or ".join(f"{n:,}" for n in sorted({row["n_items"] for row in rows}))
    what = kind.what.format(items=items)
    text = paragraph(f"**{kind.title}**: {what} {_ratios.terms(rows)} {record.origin()}")
    noise = _ratios.noise(rows) if kind.field == "median_ms" else ""
    return "\n\n".join(filter(None, [text, table(header, lines), noise, _figure(record, rows, kind, docs)]))


def _shape(row: Row) -> tuple[str, int, int]:
    phase = "training, " if row.get("phase") == "training" and row.get("script") == "memory" else ""
    return phase, row["seq_len"], row["batch"]


def _figure(record: Record, rows: Sequence[Row], kind: Kind, docs: Path) -> str:
    """Every mode and dtype, a panel for each batch size."""
    own = _ratios.typed(rows)
    panels = [
        ("seq_len", f"batch {batch:,}", [row for row in own if row.batch == batch])
        for batch in sorted({row.batch for row in own})
    ]
    name = _ratios.figure_name(record)
    _plot.grid(docs / name, panels, kind.field, _ratios.figure_title(record, kind.title))
    return f"![{kind.title}: every model, implementation and mode](docs/{name})"
