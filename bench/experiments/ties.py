"""What ties in time do to leave-one-out: users whose test event has the same time as the one before it, and the others.

MovieLens stamps whole pages of ratings with one second. Which event of such a page is the last is then decided by the
order of the file, and what is on a page may be easier to guess than what comes after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bench.experiments import ranks
from bench.experiments.execute import Store
from bench.experiments.plan import Run
from fastm2rec.data import PrefixSamples, load_dataset
from fastm2rec.data.log import order
from fastm2rec.training.config import DataConfig


def tied(config: DataConfig) -> np.ndarray | None:
    """[n_events] bool, in the order of the data set's `items`: does the event have the time of the user's event before
    it? None where the times are not known."""
    log = load_dataset(config.dataset, config.data, user_min=config.user_min, item_min=config.item_min).log
    if log is None or log["timestamp"].null_count():
        return None
    ordered = order(log)
    same = [(ordered[name] == ordered[name].shift(1)).fill_null(False).to_numpy() for name in ("user", "timestamp")]
    return np.asarray(same[0] & same[1])


def analyse(options: Mapping[str, Any], runs: list[Run], store: Store) -> dict[str, Any]:
    """Rows by group of test users; and for each data set how many of its events are tied.

    Args:
        options: under `users`, by data set, a user's id: those below it and the others are groups as well.
        runs: finished ones.
        store: where they are.
    """
    rows: list[dict[str, Any]] = []
    data: dict[str, dict[str, Any]] = {}
    known: dict[DataConfig, np.ndarray | None] = {}
    for run in runs:
        config = run.config.data
        if config not in known:
            known[config] = tied(config)
        same = known[config]
        if same is None:
            continue
        dataset = store.inputs(run).dataset
        samples = PrefixSamples(dataset, run.config.model.max_len, "test")  # type: ignore[union-attr]
        at_once = same[samples.targets.numpy()]
        data[run.dataset] = {"events": len(same), "tied": float(same.mean()), "tests_tied": float(at_once.mean())}
        groups = [("time of the test event", "that of the one before", at_once)]
        groups += [("time of the test event", "later", ~at_once)]
        first = options.get("users", {}).get(run.dataset)
        if first is not None:
            below = np.array([dataset.users[place] < first for place in samples.user_of.tolist()])
            groups += [("users", f"below {first}", below), ("users", f"from {first} on", ~below)]
        found = store.ranks(run)["test"]
        where = {"label": run.label, "dataset": run.dataset, "seed": run.seed}
        rows += [
            {**where, "by": by, "group": group, "users": int(chosen.sum()), **_metrics(found[chosen])}
            for by, group, chosen in groups
        ]
    return {"kind": "ties", "rows": rows, "data": data}


def _metrics(found: np.ndarray) -> dict[str, float]:
    return ranks.metrics(torch.from_numpy(found)) if len(found) else {}
