"""Ops on their own: the package's implementation against each other one, as a multiple of its time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import _targets, roofline
from bench._sections._record import Record, Row, paragraph, table, timed

SHAPE = ("op", "phase", "dtype", "batch", "seq_len", "d_state")


def render(records: Sequence[Record], docs: Path) -> str:
    """A table and a figure for each device."""
    return "\n\n".join(_of(record, docs) for record in records if record.script == "kernels" and timed(record))


def _of(record: Record, docs: Path) -> str:
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in timed(record):
        groups.setdefault(tuple(row[name] for name in SHAPE), []).append(row)
    lines = []
    for own in groups.values():
        ours = _targets.fastest(row for row in own if _targets.is_ours(row))
        if ours is None:
            continue
        others = sorted((row for row in own if not _targets.is_ours(row)), key=lambda row: row["median_ms"])
        peers = ", ".join(f"{row['impl']} {row['mode']} {row['median_ms'] / ours['median_ms']:.2f}x" for row in others)
        share = f"{ours['bound_share']:.0%} of {ours['bound']}"
        lines.append([_shape(ours), ours["impl"], f"{ours['median_ms']:.3g}", share, peers])
    text = paragraph(
        "**Ops on their own**: the time of this package's fastest implementation, the share of its bound, and how many "
        f"times as long the others take. {record.origin()}"
    )
    name = f"roofline-{Path(record.path).parent.name}.png"
    shown = sorted(timed(record), key=lambda row: not _targets.is_ours(row))[: roofline.MOST_BARS]
    roofline.draw([{**record.head, "rows": [row for row in shown if row.get("bound_share") is not None]}], docs / name)
    figure = f"![Share of its bound that each implementation reaches](docs/{name})"
    return "\n\n".join([text, table(["op", "ours", "ms", "bound", "others"], lines), figure])


def _shape(row: Row) -> str:
    return roofline.label(row).partition(":")[0]
