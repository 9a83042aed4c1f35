"""How much of the ranking survives when the input is noisy: Gaussian noise on embeddings, items replaced at random.

Noise is added to what the model reads; what is ranked, and the vectors that items are scored with, stay clean. Its
standard deviation is a share of that of the trained table's entries, the same rule for every model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.experiments import ranks
from bench.experiments.execute import Store
from bench.experiments.plan import Run
from fastm2rec.base import SequentialRecommender


@contextmanager
def noisy_embeddings(model: SequentialRecommender, share: float, seed: int) -> Iterator[None]:
    """Inside, every looked-up item vector has N(0, (share * std of the table)^2) added; padding and masks have not."""
    table: Any = model.item_embedding
    scale = share * float(model.item_weight[1:].detach().std())
    generator = torch.Generator(device=model.item_weight.device).manual_seed(seed)

    def add(_: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        ids = inputs[0]
        drawn = torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)
        real = (ids >= 1) & (ids <= model.n_items)
        return output + scale * drawn * real.unsqueeze(-1)

    handle = table.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


class Replace:
    """Each item of a history becomes, with probability `share`, an item drawn evenly from the catalogue."""

    def __init__(self, n_items: int, share: float, seed: int) -> None:
        self.n_items, self.share = n_items, share
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        other = torch.randint(1, self.n_items + 1, item_ids.shape, generator=self.generator)
        hit = torch.rand(item_ids.shape, generator=self.generator) < self.share
        return torch.where(hit & (item_ids != 0), other, item_ids)


def analyse(options: Mapping[str, Any], runs: list[Run], store: Store) -> dict[str, Any]:
    """Test metrics of each run's model on clean input and under each noise, the mean over `repeats` draws."""
    rows = []
    for run in runs:
        model, dataset = store.model(run), store.inputs(run).dataset
        clean = ranks.metrics(torch.from_numpy(store.ranks(run)["test"]))
        row = {"label": run.label, "dataset": run.dataset, "seed": run.seed}
        rows.append({**row, "noise": "none", "share": 0.0, **clean})
        for kind in ("gaussian", "replaced"):
            for share in options.get(kind, []):
                drawn = [_disturbed(model, dataset, kind, share, seed) for seed in range(options.get("repeats", 1))]
                mean = {name: sum(found[name] for found in drawn) / len(drawn) for name in clean}
                rows.append({**row, "noise": kind, "share": share, **mean})
    return {"kind": "noise", "rows": rows}


def _disturbed(model: SequentialRecommender, dataset: Any, kind: str, share: float, seed: int) -> dict[str, float]:
    if kind == "replaced":
        return ranks.metrics(ranks.user_ranks(model, dataset, "test", Replace(model.n_items, share, seed)))
    with noisy_embeddings(model, share, seed):
        return ranks.metrics(ranks.user_ranks(model, dataset, "test"))
