"""How cost grows: with sequence length, with batch and with the catalogue, one at a time.

    python bench/scaling.py
    python bench/scaling.py --axes seq_len --seq-len 200 800 3200 8192 --plot scaling.png --budget-seconds 600

Item ids in, the ten best items of the catalogue out. Along an axis the other two stay at their first value. The texts
of the items are narrow here, so that a catalogue of a million fits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # from a clone, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import _axes, _driver, _inference, _options, _plot, _table
from bench._driver import Shape
from bench._results import Row

# The first value of each is where the other axes are measured.
SEQ_LEN = {"cpu": [200, 50, 800, 2048, 8192], "cuda": [200, 50, 100, 400, 800, 1600, 4096, 8192]}
BATCH = {"cpu": [4, 1, 32, 256], "cuda": [256, 1, 32, 2048, 4096]}
N_ITEMS = {"cpu": [3706, 100_000, 1_000_000], "cuda": [3706, 100_000, 1_000_000]}
TEXT_DIM = 64
COLUMNS = (
    "model", "impl", "mode", "dtype", "seq_len", "batch", "n_items", *_table.RATIOS, "peak", "bound",
)  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _options.parser(__doc__, seq_len=SEQ_LEN, batch=BATCH)
    parser.add_argument(
        "--axes", nargs="+", choices=_axes.AXES, default=list(_axes.AXES), help="what grows (default: all)"
    )
    parser.add_argument(
        "--catalogues", type=_options.positive, nargs="+", help="sizes of the catalogue (default: 3706 100000 1000000)"
    )
    parser.set_defaults(dtype=["float32"])
    options = _options.parse(parser, arguments)
    options.catalogues = options.catalogues or [options.n_items, *N_ITEMS[options.device][1:]]
    options.n_items = options.catalogues[0]
    return options


def shapes(options: argparse.Namespace) -> dict[Shape, list[str]]:
    """The shapes, each with the axes it lies on; the axes take turns, so that a short budget has something of each."""
    values = {"seq_len": options.seq_len, "batch": options.batch, "n_items": options.catalogues}
    base = {name: own[0] for name, own in values.items()}
    found: dict[Shape, list[str]] = {}
    for place in range(max(len(values[axis]) for axis in options.axes)):
        for axis in options.axes:
            for value in values[axis][place : place + 1]:
                for dtype in options.dtype:
                    found.setdefault(Shape(dtype, **(base | {axis: value})), []).append(axis)
    return found


def run(options: argparse.Namespace) -> list[Row]:
    """Measure everything that was asked for."""
    jobs = _inference.Jobs(options, TEXT_DIM)
    return _driver.sweep(options, "scaling", list(shapes(options)), jobs, jobs.empty)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    title = _driver.header(options, "ids in, top 10 out, one size at a time")
    print(title)
    rows = run(options)
    print(_table.table(rows, COLUMNS))
    if options.device == "cpu":
        print("Times on a CPU that does other work as well are good as ratios only.")
    if options.plot:
        _plot.grid(options.plot, panels(options, rows), "median_ms", title)


def panels(options: argparse.Namespace, rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """For each axis its name, a title that says where the others are, and its measured rows.

    Raises:
        ValueError: there is no measured row.
    """
    base = {"seq_len": options.seq_len[0], "batch": options.batch[0], "n_items": options.n_items}
    return _axes.panels(rows, base, options.axes)


if __name__ == "__main__":
    main()
