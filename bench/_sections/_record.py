"""A result file as the README's sections read it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
WIDTH = 120


@dataclass(frozen=True)
class Record:
    """One file of bench/results.

    Args:
        path: relative to the project, with slashes.
        head: everything but the rows: device, versions, date.
        rows: the measurements.
    """

    path: str
    head: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def script(self) -> str:
        """Which script wrote it: the file's name up to the first dash."""
        return Path(self.path).stem.split("-")[0]

    @property
    def is_gpu(self) -> bool:
        return self.head.get("device_type") == "cuda"

    def origin(self) -> str:
        """Device, versions, date and kernels, in words, with the file that holds the numbers."""
        head = self.head
        triton = f", Triton {head['triton']}" if self.is_gpu else ""
        versions = f"torch {head['torch']}{triton}, {str(head['created'])[:10]}, kernels {head['kernels_tree']}"
        return f"{head['device']}, {versions} (`{self.path}`)"


def read(root: Path) -> list[Record]:
    """Every result file below bench/results, except those of ahead-of-time compilation, by path.

    Raises:
        ValueError: a file is not a result file.
    """
    found = []
    for path in sorted((root / "bench" / "results").glob("*/*.json")):
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or "rows" not in document:
            raise ValueError(f"{path}: expected a result file with rows")
        head = {name: value for name, value in document.items() if name != "rows"}
        if head.get("device") is not None:
            found.append(Record(path.relative_to(root).as_posix(), head, document["rows"]))
    return found


def timed(record: Record) -> list[Row]:
    """The rows that have a time."""
    return [row for row in record.rows if row.get("median_ms") is not None]


def paragraph(text: str) -> str:
    """Text in lines, as the README has them."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows).replace("| --- ", "|---").replace("|--- |", "|---|")
