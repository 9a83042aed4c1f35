"""Who is served how well: users by the length of their history, targets by their training events, and items that
training never saw, scored from their text.

An unseen item's vector was never a target: the softmax has only pushed it away. From the seen items a ridge regression
learns to predict a vector from its text; its strength is chosen on a tenth of the seen items that are held out. The
prediction then stands in for the vectors of the unseen items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.experiments import bootstrap, ranks
from bench.experiments.execute import Store
from bench.experiments.plan import Run
from fastm2rec.data import PrefixSamples
from fastm2rec.reference.gated_fusion import scale_text
from fastm2rec.training import load_inputs
from fastm2rec.training.evaluate import popularity

_STRENGTHS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)


def ridge(x: Tensor, y: Tensor, strength: float) -> Tensor:
    """[features + 1, outputs]: weights of least squares with an L2 penalty, and an offset without one, last row."""
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    centred = x - mean_x
    penalty = strength * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (y - mean_y))
    return torch.cat([weight, (mean_y - mean_x @ weight).unsqueeze(0)])


def vectors_from_text(table: Tensor, text: Tensor, seen: Tensor) -> Tensor:
    """`table` [n_items + 1, D] with the rows of unseen items predicted from `text` [n_items + 1, T]; `seen` [n] ids."""
    x, y = scale_text(text.float(), "unit_variance").double(), table.double()
    held_out = torch.zeros(len(seen), dtype=torch.bool)
    held_out[torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[: len(seen) // 10]] = True
    fit, check = seen[~held_out], seen[held_out]

    def error(strength: float) -> float:
        weight = ridge(x[fit], y[fit], strength)
        return float((x[check] @ weight[:-1] + weight[-1] - y[check]).square().mean())

    weight = ridge(x[seen], y[seen], min(_STRENGTHS, key=error))
    unseen = torch.ones(len(table), dtype=torch.bool)
    unseen[seen] = False
    unseen[0] = False
    return torch.where(unseen.unsqueeze(1), x @ weight[:-1] + weight[-1], y).to(table.dtype)


def grouped(values: np.ndarray, edges: Sequence[int]) -> list[tuple[str, np.ndarray]]:
    """Groups of whole numbers up to and including each edge, and the rest: a name, and which values are in it."""
    lows = [0, *(edge + 1 for edge in edges)]
    groups = [
        (f"{low} to {high}" if low < high else f"{high}", (values >= low) & (values <= high))
        for low, high in zip(lows, edges, strict=False)
    ]
    return [*groups, (f"over {edges[-1]}", values > edges[-1])]


def analyse(options: Mapping[str, Any], runs: list[Run], store: Store) -> dict[str, Any]:
    """Rows by group of users and of targets, rows of unseen targets with their own vectors and with vectors from text,
    and the comparisons of the latter with the former and with a random order."""
    rows: list[dict[str, Any]] = []
    unseen_ranks: dict[tuple[str, str, int], tuple[dict[int, np.ndarray], dict[int, np.ndarray]]] = {}
    for run in runs:
        dataset = store.inputs(run).dataset
        samples = PrefixSamples(dataset, run.config.model.max_len, "test")  # type: ignore[union-attr]
        history = (samples.targets - dataset.offsets[samples.user_of]).numpy()
        counts = popularity(dataset)
        targets = dataset.items[samples.targets]
        found = store.ranks(run)["test"]
        where = {"label": run.label, "dataset": run.dataset, "seed": run.seed}
        for by, values, edges in (
            ("history", history, options["history"]),
            ("training events", counts[targets].numpy(), options["events"]),
        ):
            rows += [{**where, "by": by, "group": name, **_summary(found[at])} for name, at in grouped(values, edges)]
        unseen = (counts[targets] == 0).numpy()
        if unseen.any():
            model = store.model(run)
            text = load_inputs(run.config.data, with_text=True).text
            assert text is not None
            seen = (counts > 0).nonzero().squeeze(1)
            weight = vectors_from_text(model.item_weight.detach(), text, seen)
            scored = ranks.user_ranks(model, dataset, "test", weight=weight).numpy()
            own, from_text = unseen_ranks.setdefault((run.dataset, run.label, dataset.n_items), ({}, {}))
            own[run.seed], from_text[run.seed] = found[unseen], scored[unseen]
            rows.append({**where, "by": "unseen", "group": "own vectors", **_summary(found[unseen])})
            rows.append({**where, "by": "unseen", "group": "vectors from text", **_summary(scored[unseen])})
            rows.append({**where, "by": "everybody", "group": "own vectors", **_summary(found)})
            rows.append({**where, "by": "everybody", "group": "vectors from text", **_summary(scored)})
    compared = []
    for (name, label, n_items), (own, from_text) in unseen_ranks.items():
        random = {seed: np.full(len(found), (n_items + 1) / 2) for seed, found in own.items()}  # its AUC is 0.5
        for against, theirs in (("own vectors", own), ("random order", random)):
            difference = bootstrap.compare(from_text, theirs, f"AUC@{n_items}")
            compared.append({"dataset": name, "label": label, "against": against, **difference})
    return {"kind": "cold_start", "rows": rows, "comparisons": compared}


def _summary(found: np.ndarray) -> dict[str, Any]:
    if not len(found):
        return {"users": 0}
    return {"users": len(found), "median_rank": float(np.median(found)), **ranks.metrics(torch.from_numpy(found))}
