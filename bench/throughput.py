"""Throughput of next-item inference: sequences per second against batch and sequence length.

    python bench/throughput.py --seq-len 200
    python bench/throughput.py --seq-len 50 200 800 --batch 256 4096 --plot throughput.png --budget-seconds 600

Item ids in, the ten best items of the catalogue out. Every implementation is checked against its reference on the same
inputs before it is timed; all of one shape are timed in turn, round after round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # from a clone, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import _driver, _inference, _options, _plot, _table
from bench._results import Row

SEQ_LEN = {"cpu": [50, 200], "cuda": [200, 50, 800, 1600]}
BATCH = {"cpu": [16, 128], "cuda": [4096, 2048, 256]}
COLUMNS = (
    "model", "impl", "mode", "dtype", "seq_len", "batch", "sequences", *_table.RATIOS, "peak", "bound"
)  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return _options.parse(_options.parser(__doc__, seq_len=SEQ_LEN, batch=BATCH), arguments)


def run(options: argparse.Namespace) -> list[Row]:
    """Measure everything that was asked for."""
    jobs = _inference.Jobs(options)
    return _driver.sweep(options, "throughput", list(_driver.grid(options)), jobs, jobs.empty)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    title = _driver.header(options, f"ids in, top 10 of {options.n_items:,} items out")
    print(title)
    rows = run(options)
    print(_table.table(rows, COLUMNS))
    if options.device == "cpu":
        print("Times on a CPU that does other work as well are good as ratios only.")
    _plot.draw(options.plot, rows, title, _plot.THROUGHPUT)


if __name__ == "__main__":
    main()
