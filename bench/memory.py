"""Peak memory of inference and of a training step, on top of the weights.

    python bench/memory.py --seq-len 200
    python bench/memory.py --seq-len 50 200 800 --batch 2048 --phases training --plot memory.png

On CUDA it is what the allocator counts, on a CPU the growth of the process's resident set. "state" is held all the
time: weights and, in training, gradients and Adam's moments. A CUDA graph holds its memory from capture to its end, so
there is none here: neither on its own nor behind torch.compile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # from a clone, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import _driver, _inference, _memory, _options, _plot, _table, _training
from bench._driver import Job, Shape
from bench._results import Row

SEQ_LEN = {"cpu": [50, 200], "cuda": [200, 50, 800]}
BATCH = {"cpu": [32], "cuda": [2048]}
PHASES = {"inference": _inference.Jobs, "training": _training.Jobs}
COLUMNS = (
    "model", "impl", "mode", "dtype", "phase", "positions", "batch", "seq_len", "peak", "memory_ratio", "state",
)  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _options.parser(__doc__, seq_len=SEQ_LEN, batch=BATCH)
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES), help="default: both")
    options = _options.parse(parser, arguments)
    reason = _memory.unavailable(torch.device(options.device))
    if reason is not None:
        parser.error(f"--device {options.device}: {reason}")
    return options


def run(options: argparse.Namespace) -> list[Row]:
    """Measure everything that was asked for."""
    makers = [PHASES[phase](options, graphs=False) for phase in options.phases]

    def make(shape: Shape) -> list[Job]:
        return [job for maker in makers for job in maker(shape)]

    def empty(shape: Shape) -> list[Row]:
        return [row for maker in makers for row in maker.empty(shape)]

    return _driver.sweep(options, "memory", list(_driver.grid(options)), make, empty, only_memory=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    title = _driver.header(options, f"peak memory on top of the weights, {options.n_items:,} items")
    print(title)
    rows = run(options)
    print(_table.table(rows, COLUMNS))
    print("x SASRec: against the SASRec of the same dtype, and loss, that needs least.")
    _plot.draw(options.plot, rows, title, _plot.MEMORY)


if __name__ == "__main__":
    main()
