"""The figures of docs/experiments.md, each from a record."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PALETTE = ("#0b6e99", "#c8553d", "#5b8c3a", "#8d6a9f", "#b8860b", "#444444")


MOST_COLUMNS = 2  # a page is no wider; panels beyond go below


def _figure(panels: int, width: float = 4.6, height: float = 3.6, columns: int = MOST_COLUMNS) -> tuple[Any, list[Any]]:
    """A figure and its panels, each `width` by `height` inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(columns, panels)
    lines = -(-panels // columns)
    size = max(6.0, width * columns), height * lines
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for unused in grid.flat[panels:]:
        unused.remove()
    return figure, list(grid.flat[:panels])


def _save(figure: Any, path: Path) -> str:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path.name


def differences(record: Mapping[str, Any], path: Path, metric: str = "NDCG@10") -> str:
    """Every model's difference to `compare_to` with its interval, a panel for each data set."""
    rows = [row for row in record["comparisons"] if (row["split"], row["metric"]) == ("test", metric)]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    most = max(sum(row["dataset"] == dataset for row in rows) for dataset in datasets)
    figure, panels = _figure(len(datasets), 5.2, 1.2 + 0.34 * most)
    for panel, dataset in zip(panels, datasets, strict=True):
        own = [row for row in rows if row["dataset"] == dataset][::-1]
        for place, row in enumerate(own):
            seeds = len(row["by_seed"])
            panel.plot([row["low"], row["high"]], [place, place], color=PALETTE[0], linewidth=2)
            panel.plot(row["difference"], place, "o", color=PALETTE[0])
            panel.plot(list(row["by_seed"].values()), [place] * seeds, "|", color=PALETTE[1], markersize=9)
        panel.axvline(0, color="#444444", linewidth=0.8)
        panel.set_yticks(range(len(own)), [f"{row['label']} ({len(row['by_seed'])})" for row in own], fontsize=8)
        panel.set_title(dataset, fontsize=10)
        panel.set_xlabel(f"test {metric} less {record['compare_to']}'s", fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
        panel.locator_params(axis="x", nbins=5)
        panel.set_ylim(len(own) - most - 0.5, len(own) - 0.5)  # as close in every panel, from the top
        panel.grid(axis="x", alpha=0.25)
    return _save(figure, path)


def against(record: Mapping[str, Any], option: str, path: Path, text: str) -> str:
    """Test and validation NDCG@10 against a numeric option, where that alone differs; `compare_to` as a line."""
    datasets = list(dict.fromkeys(row["dataset"] for row in record["runs"]))
    figure, panels = _figure(len(datasets))
    for panel, dataset in zip(panels, datasets, strict=True):
        here = [row for row in record["runs"] if row["dataset"] == dataset]
        groups: dict[tuple[str, str], dict[float, list[float]]] = {}
        for row in here:
            if row["label"] == record["compare_to"] and option not in row["options"]:
                continue
            if (series := _series(row, option)) is not None:
                for split in ("test", "valid"):
                    values = groups.setdefault((series, split), {})
                    values.setdefault(row["options"][option], []).append(row[split]["NDCG@10"])
        for place, ((series, split), values) in enumerate(groups.items()):
            x = sorted(values)
            style = "-" if split == "test" else "--"
            colour = PALETTE[place // 2 % len(PALETTE)]
            panel.plot(x, [statistics.fmean(values[at]) for at in x], style, marker="o", markersize=4, color=colour,
                       label=f"{series}{split}")  # fmt: skip
        base = [row for row in here if row["label"] == record["compare_to"] and option not in row["options"]]
        if base:
            level = statistics.fmean(row["test"]["NDCG@10"] for row in base)
            panel.axhline(level, color="#444444", linewidth=1, label=f"{record['compare_to']}, test")
        panel.set_title(dataset, fontsize=10)
        panel.set_xlabel(text)
        panel.set_ylabel("NDCG@10")
        panel.legend(fontsize=7, handlelength=4)  # long enough to tell a dashed line
        panel.grid(alpha=0.25)
    return _save(figure, path)


def _series(row: Mapping[str, Any], option: str) -> str | None:
    """Which line a run is part of; None for one that differs in more than the option and the filter's place."""
    options = row["options"]
    plain = {"mask": "hard", "basis": "fourier", "spectrum": "padded", "d_state": 16}
    if option not in options or any(options.get(name, value) != value for name, value in plain.items()):
        return None
    return f"{options['filter_placement']}, "


def spectrum(analysis: Mapping[str, Any], path: Path, theta: float) -> str:
    """Power by frequency: of the items' text against chance, around the filter, and of the cycle of known period."""
    rows = analysis["rows"]
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    figure, panels = _figure(len(names), 4.2)
    styles = {
        "kinds on a circle": (PALETTE[3], "-"),
        "unrelated kinds": (PALETTE[4], "-"),
        "text of the items": (PALETTE[0], "-"), "text, shuffled in time": (PALETTE[0], ":"),
        "before the filter": (PALETTE[1], "-"), "after the filter": (PALETTE[2], "--"),
    }  # fmt: skip
    for panel, name in zip(panels, names, strict=True):
        for row in rows:
            if row["dataset"] == name:
                x = [(place + 1) / row["length"] for place in range(len(row["power"]))]
                colour, style = styles[row["signal"]]
                panel.plot(x, row["power"], style, color=colour, label=row["signal"])
        panel.axvline(theta, color="#444444", linewidth=0.8, linestyle="--")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("cycles per step")
        panel.set_ylabel("share of the power")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7)
    return _save(figure, path)


def dynamics(analysis: Mapping[str, Any], path: Path) -> str:
    """alpha, beta and theta by epoch: a colour for each model, a style for each data set, a line for each seed."""
    rows = analysis["rows"]
    names = [name for name in ("alpha", "beta", "theta") if any(name in row for row in rows)]
    figure, panels = _figure(len(names), 4.0, columns=3)
    units = {"theta": "theta (cycles per step)"}
    keys = list(dict.fromkeys((row["dataset"], row["label"], row["seed"]) for row in rows))
    start = {"alpha": 0.5, "beta": 0.5}
    datasets, labels = (list(dict.fromkeys(key[i] for key in keys)) for i in (0, 1))
    for panel, name in zip(panels, names, strict=True):
        for key in keys:
            own: Sequence[Mapping[str, Any]] = [
                row for row in rows if (row["dataset"], row["label"], row["seed"]) == key and name in row
            ]
            x, y = [row["epoch"] for row in own], [row[name] for row in own]
            if name in start:
                x, y = [0, *x], [start[name], *y]
            colour = PALETTE[labels.index(key[1]) % len(PALETTE)]
            style = ("-", "--", ":", "-.")[datasets.index(key[0]) % 4]
            label = f"{key[0]}, {key[1]}"
            panel.plot(x, y, style, marker="o", markersize=2.5, linewidth=1.1, color=colour, label=label)
        panel.set_title(units.get(name, name), fontsize=10)
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.25)
    lines, texts = panels[-1].get_legend_handles_labels()
    once = dict(zip(texts, lines, strict=True))  # the seeds of a model look alike
    panels[-1].legend(
        once.values(), once.keys(), fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0), handlelength=3.5
    )
    return _save(figure, path)
