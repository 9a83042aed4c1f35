"""The short accuracy record; the experiments have a page of their own, docs/experiments.md."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from bench._sections._record import WIDTH, Record, Row, paragraph, table

METRICS = ("HR@10", "NDCG@10", "MRR@10")
DATASETS = {"ml-100k": "MovieLens 100K"}


def render(records: Sequence[Record], docs: Path) -> str:
    """A table for each accuracy file of bench/results/<device>."""
    parts = [_of(record) for record in records if record.script == "accuracy"]
    if (docs / "experiments.md").exists():
        parts.append(
            "More data sets, ablations, strides, noise and cold start: [docs/experiments.md](docs/experiments.md)."
        )
    return "\n\n".join(parts)


def _of(record: Record) -> str:
    name = Path(record.path).stem.partition("-")[2]
    lines = []
    for row in record.rows:
        epochs = "" if row.get("epochs") is None else f"{row['epochs']}, {row['best_epoch']}"
        lines.append([row["run"], *(f"{row[metric]:.4f}" for metric in METRICS), epochs, _seed(row)])
    text = paragraph(
        f"**{DATASETS.get(name, name)}**: test metrics from `fastm2rec evaluate`, every user's last item ranked among "
        f"all items. {record.origin()}"
    )
    commands = "\n".join(_command(row["command"]) for row in record.rows if row.get("command"))
    header = ["model", *METRICS, "epochs, best", "seed"]
    runs = "The runs:"
    if len({row["run"] for row in record.rows}) == len(record.rows):
        runs = "One seed each: a small difference between two rows orders nothing. The runs:"
    return f"{text}\n\n{table(header, lines)}\n\n{runs}\n\n{commands}"


def _command(text: str) -> str:
    """A block of code that can be copied as it is."""
    lines = textwrap.wrap(text, WIDTH - 8, break_long_words=False, break_on_hyphens=False)
    return "    " + " \\\n      ".join(lines)


def _seed(row: Row) -> str:
    return "" if row.get("seed") is None else str(row["seed"])
