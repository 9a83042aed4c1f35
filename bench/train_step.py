"""The training step: forward, cross-entropy over the whole catalogue, backward, Adam.

    python bench/train_step.py --seq-len 200
    python bench/train_step.py --seq-len 50 200 --batch 256 2048 --plot train.png --budget-seconds 600

Every model has its loss at the last position, as M2Rec must have; "as published" has SASRec's at all positions and
BERT4Rec's at masked ones. Loss and gradients are checked against the reference before a step is timed. Without dropout;
bfloat16 is autocast. On a CPU the process keeps the memory that it frees, as `fastm2rec train` does: models that take
turns would else wait for the system to give them, page by page, what the one before gave back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # from a clone, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import _driver, _options, _plot, _table, _training
from bench._results import Row
from fastm2rec.training.runtime import keep_freed_memory

SEQ_LEN = {"cpu": [50, 200], "cuda": [200, 50, 800]}
BATCH = {"cpu": [32], "cuda": [2048]}
COLUMNS = (
    "model", "impl", "mode", "dtype", "positions", "batch", "seq_len", *_table.RATIOS, "sequences",
    "peak", "bound",
)  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return _options.parse(_options.parser(__doc__, seq_len=SEQ_LEN, batch=BATCH), arguments)


def run(options: argparse.Namespace) -> list[Row]:
    """Measure everything that was asked for."""
    if options.device == "cpu":
        keep_freed_memory()
    jobs = _training.Jobs(options)
    return _driver.sweep(options, "train_step", list(_driver.grid(options)), jobs, jobs.empty)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    title = _driver.header(options, f"training step, {options.n_items:,} items, cross-entropy, Adam")
    print(title)
    rows = run(options)
    print(_table.table(rows, COLUMNS))
    print("A step with its loss at all or at masked positions learns from more targets than one at the last position.")
    if options.device == "cpu":
        print("Times on a CPU that does other work as well are good as ratios only.")
    _plot.draw(options.plot, rows, title, _plot.TRAINING)


if __name__ == "__main__":
    main()
