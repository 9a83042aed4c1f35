"""Figures of rows: lines where something grows along an axis, bars where there is one size; dtypes below each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._results import Row

MARKERS = {
    "as published": "s", "last query": "o", "reference": "D", "torch.fft + loop": "^", "torch + loop": "^",
    "torch.fft + mamba_ssm": "v", "torch + mamba_ssm": "v", "mamba_ssm": "<", "triton": "*", "cpu": "P",
}  # fmt: skip
COLOURS = {"m2rec": "#0b6e99", "mamba4rec": "#5b8c3a", "sasrec": "#c8553d", "bert4rec": "#8d6a9f"}
LINES = {"eager": "--", "compiled": "-", "graph": ":", "folded": "-.", "folded graph": (0, (6, 1))}

LABELS = {
    "seq_len": "sequence length (items)",
    "batch": "batch (sequences)",
    "n_items": "catalogue (items)",
    "median_ms": "ms per batch (median)",
    "sequences_per_s": "sequences per second (median)",
    "peak_mem_mb": "peak memory of a call (MB)",
}
PANEL_TITLES = {"batch": "batch {:,}", "seq_len": "length {:,}", "phase": "{}", "n_items": "{:,} items"}
# Long names of processors do not fit a figure's title in one line, and right of the panels is the legend.
PANEL_INCHES = 5.0
TITLE_PER_INCH = 13  # letters
TITLE_MOST = 110


@dataclass(frozen=True)
class Figure:
    """Which fields of a row are where; `x` may be left to each panel, by the value of `panel`."""

    x: str
    y: str
    panel: str


LATENCY = Figure("seq_len", "median_ms", "batch")
THROUGHPUT = Figure("batch", "sequences_per_s", "seq_len")
MEMORY = Figure("seq_len", "peak_mem_mb", "phase")
TRAINING = Figure("seq_len", "median_ms", "batch")


def draw(path: str | Path | None, rows: Sequence[Row], title: str, figure: Figure) -> None:
    """Draw the rows that have a value to a PNG, and say so; nothing where `path` is None.

    Raises:
        ValueError: there is no such row.
    """
    if path is None:
        return
    measured = [row for row in rows if getattr(row, figure.y) is not None]
    if not measured:
        raise ValueError("plot: expected at least one measured row, got none")
    columns = sorted({getattr(row, figure.panel) for row in measured})
    panels = [
        (figure.x, PANEL_TITLES[figure.panel].format(value), [r for r in measured if getattr(r, figure.panel) == value])
        for value in columns
    ]
    grid(path, panels, figure.y, title)


def grid(path: str | Path, panels: Sequence[tuple[str, str, Sequence[Row]]], y: str, title: str) -> None:
    """Panels side by side, dtypes one above the other.

    Args:
        path: of the PNG.
        panels: for each its x field, its title and its rows.
        y: the field that is drawn.
        title: of the whole figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = list(dict.fromkeys(row.dtype for _, _, rows in panels for row in rows))
    lines = any(len({getattr(row, x) for row in rows}) > 1 for x, _, rows in panels)
    size = (PANEL_INCHES * len(panels) + (2.6 if lines else 2.0), 4.4 * len(dtypes))
    figure, axes = plt.subplots(len(dtypes), len(panels), figsize=size, squeeze=False, layout="constrained")
    for line, dtype in zip(axes, dtypes, strict=True):
        for axis, (x, name, rows) in zip(line, panels, strict=True):
            own = [row for row in rows if row.dtype == dtype]
            axis.set_title(f"{name}, {dtype}", fontsize=10)
            if not own:
                axis.text(0.5, 0.5, "no measured row", ha="center", transform=axis.transAxes)
                axis.set_axis_off()
            elif lines:
                _lines(axis, own, x, y)
            else:
                _bars(axis, own, y)
    if lines:
        handles = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, handlelength=4)
    figure.suptitle(_wrapped(title, len(panels)), fontsize=10, x=0.02, ha="left")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"figure: {path}")


def _wrapped(title: str, panels: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(title, min(TITLE_MOST, int(TITLE_PER_INCH * PANEL_INCHES * panels))))


def _label(row: Row) -> str:
    where = "" if row.positions in (None, "last") else f", loss at {row.positions} positions"
    return f"{row.model}, {row.impl}" + ("" if row.mode == "eager" else f", {row.mode}") + where


def _bars(axis: Any, rows: Sequence[Row], y: str) -> None:
    def value(row: Row) -> float:
        return float(getattr(row, y))

    rows = sorted(rows, key=value, reverse=y != "sequences_per_s")
    places = range(len(rows))
    axis.barh(places, [value(row) for row in rows], color=[COLOURS[row.model] for row in rows])
    ends = [value(row) for row in rows]
    if y == "median_ms":
        low = [value(row) - (row.p20_ms or 0) for row in rows]
        high = [(row.p80_ms or 0) - value(row) for row in rows]
        axis.errorbar(ends, places, xerr=[low, high], fmt="none", ecolor="#333333", capsize=2)
        ends = [row.p80_ms or 0 for row in rows]
    axis.set_yticks(places, [_label(row) for row in rows], fontsize=8)
    for place, row, end in zip(places, rows, ends, strict=True):
        text = f"{value(row):,.0f}" if value(row) >= 100 else f"{value(row):.3g}"
        axis.annotate(text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(min(value(row) for row in rows) / 2, max(ends) * 3)
    _plain_ticks(axis.xaxis)
    axis.set_xlabel(LABELS[y] + ("; whiskers: 20 to 80 %" if y == "median_ms" else ""))
    axis.grid(axis="x", alpha=0.25)


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... as numbers, or powers of ten where there would be too many."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if low > 0 and high / low < 2e3 else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}"))
    axis.set_minor_locator(ticker.NullLocator())


def _lines(axis: Any, rows: Sequence[Row], x: str, y: str) -> None:
    for label in dict.fromkeys(_label(row) for row in rows):
        own = sorted((row for row in rows if _label(row) == label), key=lambda row: getattr(row, x))
        first = own[0]
        axis.plot(
            [getattr(row, x) for row in own],
            [getattr(row, y) for row in own],
            linestyle=LINES.get(first.mode, "-"),
            marker=MARKERS.get(first.impl, "o"),
            markersize=4,
            color=COLOURS[first.model],
            label=label,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({getattr(row, x) for row in rows})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30 if _crowded(ticks) else 0)
    axis.minorticks_off()
    axis.set_xlabel(LABELS[x])
    _plain_ticks(axis.yaxis)
    axis.set_ylabel(LABELS[y])
    axis.grid(alpha=0.25)


def _crowded(ticks: Sequence[int]) -> bool:
    """Would the labels of a logarithmic axis run into each other?"""
    gaps = [math.log(high / low) for low, high in itertools.pairwise(ticks)]
    return len(ticks) > 5 or min(gaps, default=1.0) < sum(gaps) / 8
