"""Ranking metrics over the whole catalogue: where the true next item stands among all items; HR, NDCG and MRR of that.

With one relevant item per user the three metrics are functions of its rank r alone:

    HR@k = [r <= k]      NDCG@k = [r <= k] / log2(r + 1)      MRR@k = [r <= k] / r

so a histogram of ranks holds everything. Its counts are integers: their sum over batches, devices and processes has one
value whatever the order, and the metrics computed from it are the same to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Scores held at once by target_ranks, rows times items: 32 MB in float64.
_MAX_SCORES = 2**22


def target_ranks(
    query: Tensor,
    weight: Tensor,
    targets: Tensor,
    exclude: tuple[Tensor, Tensor] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The rank of each row's target among all items, 1 for the best, scored by dot products.

    Of equal scores the lower item id ranks first. Scores are summed in float64 and rounded to float32, so items with
    equal vectors tie exactly, however the catalogue is cut into chunks and whatever else is in the batch.

    Args:
        query: [B, D] floating point.
        weight: [n_items + 1, D] item vectors; row 0 is padding and is never ranked.
        targets: [B] int64, 1 to n_items.
        exclude: items left out of each row's ranking, ragged: flat [n] int64 ids and offsets [B + 1] int64. A row's own
            target is ranked even where it is listed, as when somebody buys again what he has bought before.
        chunk: items scored at once; None takes as many as keep the scores within 32 MB.

    Returns:
        [B] int64 on the query's device.

    Raises:
        ValueError: wrong shapes, targets outside 1..n_items, or scores that are NaN or infinite.
    """
    if query.dim() != 2 or weight.dim() != 2 or query.shape[1] != weight.shape[1]:
        raise ValueError(
            f"query, weight: expected shapes [B, D] and [n_items + 1, D], got {list(query.shape)} and "
            f"{list(weight.shape)}"
        )
    rows, n_items = len(query), len(weight) - 1
    if targets.shape != (rows,):
        raise ValueError(f"targets: expected shape [{rows}], got {list(targets.shape)}")
    if rows and not 1 <= int(targets.min()) <= int(targets.max()) <= n_items:
        raise ValueError(
            f"targets: expected items from 1 to {n_items}, got {int(targets.min())} to {int(targets.max())}"
        )
    if chunk is None:
        chunk = max(1, _MAX_SCORES // max(1, rows))
    elif chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    if exclude is not None:
        flat, offsets = exclude
        if offsets.shape != (rows + 1,) or (rows and int(offsets[-1]) != len(flat)):
            raise ValueError(
                f"exclude: expected offsets of shape [{rows + 1}] that end at {len(flat)}, the number of ids, got "
                f"shape {list(offsets.shape)}"
            )
        excluded_rows = torch.repeat_interleave(torch.arange(rows, device=query.device), offsets.diff())
    exact, table = query.double(), weight.double()
    # Summed by the same routine as the scores would be, this could still be off by a float64 rounding: hence float32.
    own = (exact * table[targets]).sum(dim=1, keepdim=True).float()
    finite = own.isfinite().all()
    better = torch.zeros(rows, dtype=torch.int64, device=query.device)
    for start in range(1, n_items + 1, chunk):
        ids = torch.arange(start, min(start + chunk, n_items + 1), device=query.device)
        scores = (exact @ table[ids[0] : ids[-1] + 1].t()).float()
        finite &= scores.isfinite().all()
        ahead = (scores > own) | ((scores == own) & (ids < targets.unsqueeze(1)))
        ahead &= ids != targets.unsqueeze(1)
        if exclude is not None:
            here = (flat >= ids[0]) & (flat <= ids[-1])
            ahead[excluded_rows[here], flat[here] - start] = False
        better += ahead.sum(dim=1)
    if not finite:
        raise ValueError("the scores hold NaN or infinity: the model's weights, or its text table, are not finite")
    return better + 1


class RankingMetrics:
    """HR, NDCG and MRR of the ranks seen so far.

    Args:
        cutoffs: the k of HR@k, NDCG@k and MRR@k.

    Raises:
        ValueError: no cut-off, or one below 1.
    """

    def __init__(self, cutoffs: Sequence[int] = (10, 20)) -> None:
        if not cutoffs or min(cutoffs) < 1:
            raise ValueError(f"cutoffs: expected integers of at least 1, got {list(cutoffs)}")
        self.cutoffs = tuple(cutoffs)
        # counts[r] for ranks r up to the largest cut-off; counts[0] holds the ranks beyond it.
        self.counts = torch.zeros(max(cutoffs) + 1, dtype=torch.int64)

    def update(self, ranks: Tensor) -> None:
        """Add ranks, int64 of any shape, 1 for the best.

        Raises:
            ValueError: a rank below 1.
        """
        ranks = ranks.flatten().cpu()
        if ranks.numel() and int(ranks.min()) < 1:
            raise ValueError(f"ranks: expected at least 1, got {int(ranks.min())}")
        beyond = ranks >= len(self.counts)
        self.counts += torch.bincount(ranks.masked_fill(beyond, 0), minlength=len(self.counts))

    @property
    def n(self) -> int:
        """How many ranks were added."""
        return int(self.counts.sum())

    def compute(self) -> dict[str, float]:
        """The metrics by name, "HR@10", "NDCG@10", "MRR@10" and so on for every cut-off.

        Raises:
            ValueError: no rank was added.
        """
        total = self.n
        if total == 0:
            raise ValueError("no ranks were added: there is nothing to evaluate")
        counts = self.counts.tolist()
        values = {}
        for k in self.cutoffs:
            values[f"HR@{k}"] = sum(counts[1 : k + 1]) / total
            values[f"NDCG@{k}"] = math.fsum(counts[r] / math.log2(r + 1) for r in range(1, k + 1)) / total
            values[f"MRR@{k}"] = math.fsum(counts[r] / r for r in range(1, k + 1)) / total
        return values
