"""One figure per result file: time per batch against sequence length, or against the rows where there is one length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ._results import Row

MARKERS = {"as published": "s", "reference": "D", "torch.fft + loop": "^", "triton": "*", "cpu": "P", "mamba_ssm": "v"}
COLOURS = {"m2rec": "#0b6e99", "mamba4rec": "#5b8c3a", "sasrec": "#c8553d", "bert4rec": "#8d6a9f"}


def latency(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw the measured rows to a PNG: a panel per batch size, lower is better.

    Raises:
        ValueError: there is no measured row.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = [row for row in rows if row.median_ms is not None]
    if not measured:
        raise ValueError("plot: expected at least one measured row, got none")
    batches = sorted({row.batch for row in measured})
    lengths = sorted({row.seq_len for row in measured})
    figure, panels = plt.subplots(
        1, len(batches), figsize=(max(7.0, 5.2 * len(batches)), 4.8), squeeze=False, layout="constrained"
    )
    for panel, batch in zip(panels[0], batches, strict=True):
        own = [row for row in measured if row.batch == batch]
        (_bars if len(lengths) == 1 else _lines)(panel, own)
        panel.set_title(f"batch {batch}" + (f", sequence length {lengths[0]}" if len(lengths) == 1 else ""))
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label(row: Row) -> str:
    return f"{row.model}, {row.impl}" + (", compiled" if row.mode == "compiled" else "")


def _bars(panel, rows: Sequence[Row]) -> None:
    rows = sorted(rows, key=lambda row: row.median_ms or 0, reverse=True)
    places = range(len(rows))
    medians = [row.median_ms or 0 for row in rows]
    low = [(row.median_ms or 0) - (row.p20_ms or 0) for row in rows]
    high = [(row.p80_ms or 0) - (row.median_ms or 0) for row in rows]
    panel.barh(
        places, medians, xerr=[low, high], color=[COLOURS[row.model] for row in rows], ecolor="#333333", capsize=2
    )
    panel.set_yticks(places, [_label(row) for row in rows])
    for place, value, error in zip(places, medians, high, strict=True):
        panel.annotate(f"{value:.3g}", (value + error, place), xytext=(4, 0), textcoords="offset points", va="center")
    panel.set_xscale("log")
    panel.set_xlim(min(row.p20_ms or 0 for row in rows) / 2, max(row.p80_ms or 0 for row in rows) * 2.5)
    _plain_ticks(panel.xaxis)
    panel.set_xlabel("ms per batch (median; bars: 20 to 80 %)")
    panel.grid(axis="x", alpha=0.25)


def _plain_ticks(axis) -> None:
    """1, 2, 5, 10, ... as numbers, however few decades a logarithmic axis spans."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _lines(panel, rows: Sequence[Row]) -> None:
    for label in dict.fromkeys(_label(row) for row in rows):
        own = sorted((row for row in rows if _label(row) == label), key=lambda row: row.seq_len)
        style = "-" if own[0].mode == "compiled" else "--"
        marker = MARKERS.get(own[0].impl, "o")
        x, y = [row.seq_len for row in own], [row.median_ms or 0 for row in own]
        panel.plot(x, y, style, marker=marker, markersize=4, color=COLOURS[own[0].model], label=label)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = sorted({row.seq_len for row in rows})
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.set_xlabel("sequence length (items)")
    _plain_ticks(panel.yaxis)
    panel.set_ylabel("ms per batch (median)")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=7, handlelength=4)
