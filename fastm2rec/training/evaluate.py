"""Full-ranking evaluation: all items are ranked for each user's held-out item, by a model or by popularity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..base import SequentialRecommender
from ..data import PrefixSamples, SequenceDataset
from ..data.samples import training_part
from ..metrics import RankingMetrics, target_ranks
from .config import DataConfig
from .runtime import Runtime

Split = Literal["valid", "test"]
CUTOFFS = (10, 20)

# [B, L] ids and lengths [B] to query vectors [B, D].
Encode = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def evaluate(
    model: SequentialRecommender,
    dataset: SequenceDataset,
    split: Split = "test",
    *,
    mask_history: bool = False,
    cutoffs: Sequence[int] = CUTOFFS,
    batch_size: int = 512,
    runtime: Runtime | None = None,
) -> RankingMetrics:
    """Rank each user's held-out item among the whole catalogue.

    Args:
        model: reads the last max_len items before the held-out one; where its parameters are is where this runs.
        dataset: the sequences.
        split: "valid" or "test".
        mask_history: leave out the items that the user already has.
        cutoffs: the k of the metrics.
        batch_size: users ranked at once.
        runtime: several processes share the users and all get the metrics of all of them.

    Raises:
        ValueError: no user has three events, or scores that are not finite.
    """
    training = model.training
    model.eval()
    try:
        return _rank(
            model.encode, model.item_weight, dataset, model.max_len, split, mask_history, cutoffs, batch_size, runtime
        )
    finally:
        model.train(training)


def evaluate_popularity(
    dataset: SequenceDataset,
    split: Split = "test",
    *,
    mask_history: bool = False,
    cutoffs: Sequence[int] = CUTOFFS,
    batch_size: int = 512,
) -> RankingMetrics:
    """`evaluate` of the same list for everybody: the items by their number of events in the training part.

    Raises:
        ValueError: as `evaluate`.
    """

    def everybody(item_ids: Tensor, lengths: Tensor) -> Tensor:
        return torch.ones(len(lengths), 1)

    counts = popularity(dataset).float().unsqueeze(1)
    return _rank(everybody, counts, dataset, 1, split, mask_history, cutoffs, batch_size, None)


def popularity(dataset: SequenceDataset) -> Tensor:
    """How often each item occurs in the users' training parts: [n_items + 1] int64."""
    starts, ends = dataset.offsets[:-1], training_part(dataset)
    # +1 where a training part begins and -1 where it ends: the running sum is 1 inside and 0 in what is held out.
    edges = torch.zeros(len(dataset.items) + 1, dtype=torch.int64)
    edges.index_add_(0, starts, torch.ones_like(starts)).index_add_(0, ends, -torch.ones_like(ends))
    trained = edges.cumsum(0)[:-1] > 0
    return torch.bincount(dataset.items[trained], minlength=dataset.n_items + 1)


def _rank(
    encode: Encode,
    weight: Tensor,
    dataset: SequenceDataset,
    max_len: int,
    split: Split,
    mask_history: bool,
    cutoffs: Sequence[int],
    batch_size: int,
    runtime: Runtime | None,
) -> RankingMetrics:
    samples = PrefixSamples(dataset, max_len, split)
    metrics = RankingMetrics(cutoffs)
    device = weight.device
    indices = torch.arange(len(samples))
    if runtime is not None:
        indices = runtime.share(indices)
    for part in indices.split(batch_size):
        batch = samples.batch(part)
        exclude = None
        if mask_history:
            flat, offsets = samples.history(part)
            exclude = (flat.to(device), offsets.to(device))
        query = encode(batch.item_ids.to(device), batch.lengths.to(device))
        metrics.update(target_ranks(query, weight, batch.targets.to(device), exclude))
    if runtime is not None:
        metrics.counts = runtime.total(metrics.counts).cpu()
    return metrics


def protocol(data: DataConfig, dataset: SequenceDataset, split: Split, mask_history: bool, users: int) -> str:
    """What the numbers mean, in words."""
    place = "last" if split == "test" else "second to last"
    core = f"users with {data.user_min} and items with {data.item_min} events or more (k-core)"
    return (
        f"{data.dataset}: {core}; target: the {place} item of each of {users:,} users, events in order of time, equal "
        f"times in the order of the file; ranked among all {dataset.n_items:,} items, "
        f"{'less those of the history' if mask_history else 'those of the history included'}, equal scores by item id."
    )
