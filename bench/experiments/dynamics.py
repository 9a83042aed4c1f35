"""What gate and filter learn, epoch by epoch: alpha, beta and theta from the runs' metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.experiments.execute import Store
from bench.experiments.plan import Run


def analyse(options: Mapping[str, Any], runs: list[Run], store: Store) -> dict[str, Any]:
    """A row for each epoch of each run."""
    rows = [
        {
            "label": run.label,
            "dataset": run.dataset,
            "seed": run.seed,
            "epoch": line["epoch"],
            "NDCG@10": line["valid"]["NDCG@10"],
            **{name.rpartition(".")[2]: value for name, value in line["learned"].items()},
        }
        for run in runs
        for line in store.history(run)
    ]
    return {"kind": "dynamics", "rows": rows}
