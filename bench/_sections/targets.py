"""What a GPU said about the targets; in plain words where no GPU has said anything yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import _targets
from bench._sections._record import Record

NOTHING = """**No GPU time is recorded yet.** Every time below was taken on a CPU and says nothing about the Triton
kernels: what is known of those is that they are correct, in Triton's interpreter and as compiled, in an emulator, and
the resources that `python bench/resources.py` prints. `python bench/run_all.py --budget-minutes 8 --record` on a
machine with a GPU fills this in."""


def render(records: Sequence[Record], docs: Path) -> str:
    """A table per GPU: each target, what was found, and the rows that say so."""
    gpus: dict[str, list[Record]] = {}
    for record in records:
        if record.is_gpu:
            gpus.setdefault(record.head["device"], []).append(record)
    if not gpus:
        return NOTHING
    parts = []
    for device, own in gpus.items():
        rows = {record.script: record.rows for record in own}
        origins = "\n".join(f"* {record.origin()}" for record in own if record.rows)
        parts.append(
            f"**{device}**, against the targets of an H200:\n\n{_targets.table(_targets.evaluate(rows))}\n\n{origins}"
        )
    return "\n\n".join(parts)
