"""Latency of next-item inference: item ids in, the ten best items of the catalogue out.

    python bench/latency.py --seq-len 200
    python bench/latency.py --seq-len 50 200 800 --batch 1 32 256 --plot latency.png --budget-seconds 600

M2Rec, Mamba4Rec, SASRec and BERT4Rec, each computed in every way there is, on the device at hand. Every one is checked
against its reference on the same inputs before it is timed; all of one shape are timed in turn, round after round.
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

SEQ_LEN = {"cpu": [200], "cuda": [50, 200, 800]}
BATCH = {"cpu": [1, 32], "cuda": [1, 32, 256]}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _options.parser(__doc__, seq_len=SEQ_LEN, batch=BATCH)
    parser.add_argument("--topk", type=_options.positive, default=_inference.TOPK, help="items out (default: 10)")
    options = _options.parse(parser, arguments)
    if options.topk > options.n_items:
        parser.error(f"--topk: expected at most --n-items={options.n_items}, got {options.topk}")
    return options


def run(options: argparse.Namespace) -> list[Row]:
    """Measure everything that was asked for."""
    jobs = _inference.Jobs(options)
    return _driver.sweep(options, "latency", list(_driver.grid(options)), jobs, jobs.empty)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    what = f"ids in, top {options.topk} of {options.n_items:,} items out"
    title = _driver.header(options, what)
    print(title)
    rows = run(options)
    print(_table.table(rows))
    if options.device == "cpu":
        print("Times on a CPU that does other work as well are good as ratios only.")
    _plot.draw(options.plot, rows, title, _plot.LATENCY)


if __name__ == "__main__":
    main()
