"""Markdown tables of an experiment: each row says with how many seeds and samples it was made, and what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.experiments import claims

SHOWN = ("HR@10", "NDCG@10", "MRR@10")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table; the first `left` columns are aligned to the left."""
    rule = ["---" if place < left else "---:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation over seeds where there are several."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def of_runs(record: Mapping[str, Any]) -> str:
    """One table for each data set: what was trained, what it reached, and the difference to `compare_to`."""
    parts = []
    for dataset in dict.fromkeys(row["dataset"] for row in [*record["runs"], *record["missing"]]):
        here = [row for row in record["runs"] if row["dataset"] == dataset]
        missing = [row for row in record["missing"] if row["dataset"] == dataset]
        found = {
            row["label"]: row
            for row in record["comparisons"]
            if (row["dataset"], row["split"], row["metric"]) == (dataset, "test", "NDCG@10")
        }
        against = f"NDCG@10 less {record['compare_to']}'s"
        header = ["model", "seeds", "samples seen", "stopped", "valid NDCG@10", *SHOWN, against, "so it is"]
        rows = []
        for label in dict.fromkeys(row["label"] for row in here):
            own = [row for row in here if row["label"] == label]
            figures = [spread([row["valid"]["NDCG@10"] for row in own])]
            figures += [spread([row["test"][name] for row in own]) for name in SHOWN]
            asked = len(own) + sum(row["label"] == label for row in missing)
            rows.append([label, f"{len(own)} of {asked}", *_effort(own), *figures, *_difference(found.get(label))])
        absent = [
            label for label in dict.fromkeys(row["label"] for row in missing) if label not in {r[0] for r in rows}
        ]
        parts.append(f"**{dataset}**")
        if rows:
            parts.append(markdown(header, rows))
        if absent:
            parts.append(f"Not run, for want of time: {'; '.join(absent)}.")
    return "\n\n".join(parts)


def _effort(own: Sequence[Mapping[str, Any]]) -> list[str]:
    """Samples seen in training, and how it ended."""
    options = own[0]["options"]
    epochs = [row["epochs"] for row in own]
    seen = f"{statistics.fmean(row['steps'] for row in own) * options['batch_size'] / 1000:.0f} k"
    if options["model"] == "bert4rec" or options["positions"] == "all":
        seen += " sequences"
    shown = f"{min(epochs)}" if min(epochs) == max(epochs) else f"{min(epochs)} to {max(epochs)}"
    rising = sum(row["best_epoch"] == row["epochs"] for row in own)
    end = "nothing got better" if not rising else "still rising" if rising == len(own) else "some still rising"
    return [seen, f"after {shown} epochs, {end}"]


def _difference(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["", ""]
    word = {1: "better", -1: "worse", 0: "not settled"}[claims.better(found)]
    seeds = len(found["by_seed"])
    what = f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}], {seeds} seed{'s' * (seeds != 1)}"
    return [what, word]


def noise(analysis: Mapping[str, Any]) -> str:
    """NDCG@10 under each noise, and the share of the clean value that is lost."""
    kinds = list(dict.fromkeys((row["noise"], row["share"]) for row in analysis["rows"]))
    header = ["data set", "model", *(f"{kind} {share:.0%}" if share else "clean" for kind, share in kinds)]
    rows = []
    for dataset, label in dict.fromkeys((row["dataset"], row["label"]) for row in analysis["rows"]):
        values = {kind: mean_at(analysis, dataset, label, *kind) for kind in kinds}
        clean = values["none", 0.0]
        cells = [f"{value:.4f}" + (f" ({value / clean - 1:+.1%})" if kind[1] else "") for kind, value in values.items()]
        rows.append([dataset, label, *cells])
    return markdown(header, rows, left=2)


def mean_at(analysis: Mapping[str, Any], dataset: str, label: str, kind: str, share: float) -> float:
    """NDCG@10 of a model under a noise, the mean over its seeds."""
    return statistics.fmean(
        row["NDCG@10"]
        for row in analysis["rows"]
        if (row["dataset"], row["label"], row["noise"], row["share"]) == (dataset, label, kind, share)
    )


def cold_start(analysis: Mapping[str, Any], by: Sequence[str]) -> str:
    """NDCG@10 of each group of users or targets, a column a model; the mean over seeds."""
    chosen = [row for row in analysis["rows"] if row["by"] in by]
    labels = list(dict.fromkeys(row["label"] for row in chosen))
    rows = []
    for dataset, kind, group in dict.fromkeys((row["dataset"], row["by"], row["group"]) for row in chosen):
        cells, users = [], 0
        for label in labels:
            at = [
                row
                for row in chosen
                if (row["dataset"], row["by"], row["group"], row["label"]) == (dataset, kind, group, label)
            ]
            users = max([users, *(row["users"] for row in at)])
            scored = [row for row in at if row["users"]]
            if not scored:
                cells.append("")
                continue
            rank = statistics.fmean(row["median_rank"] for row in scored)
            cells.append(f"{statistics.fmean(row['NDCG@10'] for row in scored):.4f}, median rank {rank:,.0f}")
        rows.append([dataset, kind, group, f"{users:,}", *cells])
    return markdown(["data set", "by", "group", "users", *labels], rows, left=3)
