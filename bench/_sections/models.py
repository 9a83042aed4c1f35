"""Models against the fastest SASRec of the same shape: latency, throughput, training step, peak memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import _plot, _results
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
    best = {shape: _best_sasrec(rows, shape, kind.field) for shape in shapes}
    lines = []
    for name in dict.fromkeys((row["model"], row["impl"]) for row in rows):
        own = [row for row in rows if (row["model"], row["impl"]) == name]
        lines.append([*name, *(_cell(own, shape, best[shape], kind.field) for shape in shapes)])
    header = ["model", "computed by", *(f"{phase}L={length}, batch {batch}" for phase, length, batch in shapes)]
    items = " or ".join(f"{n:,}" for n in sorted({row["n_items"] for row in rows}))
    states = " or ".join(str(n) for n in sorted({row["d_state"] for row in rows if row["d_state"]}))
    text = paragraph(
        f"**{kind.title}**: {kind.what.format(items=items)} as a multiple of the best SASRec's of the same shape in "
        f"the same run, N={states}, each in its best mode and dtype; lower is better. {record.origin()}"
    )
    return "\n\n".join(
        filter(None, [text, table(header, lines), _noise(rows, kind), _figure(record, rows, kind, docs)])
    )


def _shape(row: Row) -> tuple[str, int, int]:
    phase = "training, " if row.get("phase") == "training" and row.get("script") == "memory" else ""
    return phase, row["seq_len"], row["batch"]


def _best_sasrec(rows: Sequence[Row], shape: tuple[str, int, int], field: str) -> float | None:
    return min((row[field] for row in rows if row["model"] == "sasrec" and _shape(row) == shape), default=None)


def _cell(rows: Sequence[Row], shape: tuple[str, int, int], best: float | None, field: str) -> str:
    row = min((row for row in rows if _shape(row) == shape), key=lambda row: row[field], default=None)
    if row is None or best is None:
        return ""
    words = [row["mode"]] * (row["mode"] != "eager") + ["bf16"] * (row["dtype"] == "bfloat16")
    return " ".join([f"{row[field] / best:.2f}", *words])


def _noise(rows: Sequence[Row], kind: Kind) -> str:
    """How wide the bands are: what a reader may take the digits for."""
    widths = sorted(row["p80_ms"] / row["p20_ms"] for row in rows if row.get("p20_ms"))
    if kind.field != "median_ms" or not widths:
        return ""
    return paragraph(
        f"The 80 % quantile of a row's samples is {widths[len(widths) // 2]:.2f} times the 20 % quantile in the median "
        f"row, and {widths[-1]:.2f} times in the noisiest one: differences smaller than that are noise."
    )


def _figure(record: Record, rows: Sequence[Row], kind: Kind, docs: Path) -> str:
    """Every mode and dtype, a panel for each batch size."""
    names = {field.name for field in dataclasses.fields(_results.Row)}
    own = [_results.Row(**{name: value for name, value in row.items() if name in names}) for row in rows]
    panels = [
        ("seq_len", f"batch {batch:,}", [row for row in own if row.batch == batch])
        for batch in sorted({row.batch for row in own})
    ]
    name = f"{record.script.replace('_', '-')}-{Path(record.path).parent.name}.png"
    _plot.grid(docs / name, panels, kind.field, f"{kind.title}: {record.head['device']}, torch {record.head['torch']}")
    return f"![{kind.title}: every model, implementation and mode](docs/{name})"
