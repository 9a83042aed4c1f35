"""The rank of every user's held-out item, one number a user: what paired comparisons and analyses are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastm2rec.base import SequentialRecommender
from fastm2rec.data import PrefixSamples, SequenceDataset
from fastm2rec.metrics import RankingMetrics, target_ranks

CUTOFFS = (10, 20)
_BATCH = 512

# [B, L] ids and lengths [B] to ids that a disturbed model reads instead.
Disturb = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def user_ranks(
    model: SequentialRecommender,
    dataset: SequenceDataset,
    split: Literal["valid", "test"],
    disturb: Disturb | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """[n_evaluated] int64: the rank of each user's held-out item among all items, as `fastm2rec.training.evaluate`.

    Args:
        model: as trained.
        dataset: the sequences.
        split: which item of each user is asked for.
        disturb: changes what the model reads.
        weight: other item vectors to rank with, [n_items + 1, D].
    """
    model.eval()
    samples = PrefixSamples(dataset, model.max_len, split)
    weight = model.item_weight if weight is None else weight
    found = []
    for part in torch.arange(len(samples)).split(_BATCH):
        batch = samples.batch(part)
        ids = batch.item_ids if disturb is None else disturb(batch.item_ids, batch.lengths)
        query = model.encode(ids.to(weight.device), batch.lengths.to(weight.device))
        found.append(target_ranks(query, weight, batch.targets.to(weight.device)).cpu())
    return torch.cat(found)


def metrics(ranks: Tensor) -> dict[str, float]:
    """HR, NDCG and MRR at 10 and 20."""
    counted = RankingMetrics(CUTOFFS)
    counted.update(ranks)
    return counted.compute()


def per_user(ranks: np.ndarray, name: str) -> np.ndarray:
    """HR@k or NDCG@k of each user, [n] float64; or AUC@n, n being the catalogue's size: the share of the other items
    that are ranked below the user's."""
    kind, _, k = name.partition("@")
    hit = ranks <= int(k)
    gain = {
        "HR": np.ones(len(ranks)),
        "NDCG": 1 / np.log2(ranks + 1.0),
        "AUC": (int(k) - ranks) / (int(k) - 1),
    }[kind]
    return np.where(hit, gain, 0.0)


def save(path: Path, **ranks: Tensor) -> None:
    """Write ranks by split, compactly: a catalogue's size bounds them."""
    largest = max(int(value.max()) for value in ranks.values())
    kind: Any = np.uint16 if largest < 2**16 else np.uint32
    arrays: dict[str, Any] = {name: value.numpy().astype(kind) for name, value in ranks.items()}
    np.savez_compressed(path, **arrays)


def load(path: Path) -> dict[str, np.ndarray]:
    """What `save` wrote, as int64."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name].astype(np.int64) for name in arrays}
