"""What training minimises: the softmax cross-entropy over the whole catalogue, or BCE with sampled negatives."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .impl import AUTO
from .ops import cross_entropy

Loss: TypeAlias = Literal["ce", "bce"]
Reduction: TypeAlias = Literal["mean", "sum"]


def next_item_loss(
    query: Tensor,
    weight: Tensor,
    targets: Tensor,
    kind: Loss = "ce",
    n_negatives: int = 1,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    impl: str = AUTO,
) -> Tensor:
    """The loss of predicting `targets` from `query`, in float32 at least, whatever autocast is active.

    "ce" is -log softmax(query weight^T)[target] over the items 1..n_items. "bce" is
    softplus(-s_target) + sum of softplus(s) over `n_negatives` items drawn evenly from all but the target; the items of
    the history may be drawn.

    Args:
        query: [B, D] floating point.
        weight: [n_items + 1, D] item vectors; row 0 is padding and takes no part.
        targets: [B] int64, 1 to n_items.
        kind: "ce" (what the released code and its baselines train with) or "bce" (what arXiv 2505.04445 says).
        n_negatives: negatives of each row, for "bce".
        generator: draws the negatives; None takes the device's default generator.
        reduction: "mean" or "sum" over the rows.
        impl: which implementation of `ops.cross_entropy`, for "ce".

    Returns:
        A 0-dim tensor.

    Raises:
        ValueError: an unknown word, wrong shapes, or too few items or negatives for "bce".
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    if query.dim() != 2 or weight.dim() != 2 or query.shape[1] != weight.shape[1] or targets.shape != query.shape[:1]:
        raise ValueError(
            "query, weight, targets: expected shapes [B, D], [n_items + 1, D] and [B], got "
            f"{list(query.shape)}, {list(weight.shape)} and {list(targets.shape)}"
        )
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(query.dtype, weight.dtype), torch.float32)
        query, weight = query.to(dtype), weight.to(dtype)
        if kind == "ce":
            return cross_entropy(query, weight, targets, reduction, impl=impl)
        if kind == "bce":
            return _sampled_bce(query, weight, targets, n_negatives, generator, reduction)
    raise ValueError(f"kind: expected 'ce' or 'bce', got {kind!r}")


def _sampled_bce(
    query: Tensor,
    weight: Tensor,
    targets: Tensor,
    n_negatives: int,
    generator: torch.Generator | None,
    reduction: Reduction,
) -> Tensor:
    n_items = len(weight) - 1
    if n_negatives < 1:
        raise ValueError(f"n_negatives: expected at least 1, got {n_negatives}")
    if n_items < 2:
        raise ValueError(f"weight: expected at least two items for a negative to exist, got {n_items}")
    shape = (len(targets), n_negatives)
    drawn = torch.randint(1, n_items, shape, generator=generator, device=query.device)
    negatives = drawn + (
        drawn >= targets.unsqueeze(1)
    )  # the items but the target, in order, are numbered 1..n_items - 1
    positive = (query * weight[targets]).sum(dim=1)
    negative = torch.einsum("bd,bnd->bn", query, weight[negatives])
    losses = F.softplus(-positive) + F.softplus(negative).sum(dim=1)
    return losses.mean() if reduction == "mean" else losses.sum()
