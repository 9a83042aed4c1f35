"""One file per script that grows: rows of many runs of the same kernels on the same device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import _failure
from bench._results import ROOT, write_json
from bench._tree import tree_hash
from bench.compare import key

NOBODY = "all"  # stands for the rows of a model whose shape was not begun
ORIGIN = ("kernels_tree", "device", "torch", "triton")  # what all rows of a file share


def kernels_tree() -> str:
    """The kernels as they are on the disk."""
    return tree_hash(ROOT / "kernels")[:12]


def read(path: Path) -> dict[str, Any] | None:
    """A result file; None where there is none, or none that is whole."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("rows"), list) else None


def merge(path: Path, part: dict[str, Any], script: str, quick: bool = False) -> None:
    """Add the rows of `part` to the file: a new time replaces an old one, a reason replaces no time.

    Except one: a row that lost the GPU has no time that it may keep.

    Rows of a `quick` run say so: what is compiled at leisure is measured again, with everything beside it.

    A file of other kernels or of another device is moved to `<name>.<its kernels>.json` first.
    """
    part = {**part, "kernels_tree": kernels_tree(), "script": script}
    old = read(path)
    if old is not None and not same_origin(old, part):
        path.replace(path.with_suffix(f".{old.get('kernels_tree')}.json"))
        old = None
    rows = {key(row): row for row in old["rows"]} if old is not None else {}
    for row in part["rows"]:
        if row.get("impl") == NOBODY and not is_final(row):
            continue
        if quick:
            row = {**row, "quick": True}
        before = rows.get(key(row))
        if before is None or not _has_time(before) or _has_time(row) or is_culprit(row):
            rows[key(row)] = row
    merged = {**part, "rows": list(rows.values())}
    if merged["rows"] != (old or {}).get("rows"):
        write_json(path, merged)


def same_origin(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a.get(name) == b.get(name) for name in ORIGIN)


def is_final(row: dict[str, Any]) -> bool:
    """Measured, or skipped for a reason that more time does not change."""
    reason = row.get("skipped") or ""
    return _has_time(row) or not ("--budget-seconds" in reason or reason == _failure.WAITING)


def is_culprit(row: dict[str, Any]) -> bool:
    """Did it take the GPU with it?"""
    return (row.get("skipped") or "").startswith(_failure.LOST)


def _has_time(row: dict[str, Any]) -> bool:
    return row.get("median_ms") is not None or row.get("peak_mem_mb") is not None
