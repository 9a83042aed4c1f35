"""The loss over the whole catalogue."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._values import extremes, readable
from ..impl import AUTO, resolve
from ._checks import expect_alike, expect_shape


def cross_entropy(
    query: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: Literal["mean", "sum"] = "mean",
    *,
    impl: str = AUTO,
) -> Tensor:
    """-log softmax(query weight^T)[target] over the items 1..n_items.

    Args:
        query: [B, D].
        weight: [n_items + 1, D], dtype of query; row 0 is padding and takes no part.
        targets: [B] int64, 1 to n_items.
        reduction: "mean" or "sum" over the rows.
        impl: which implementation. On a CPU "cpu" makes scores and gradients in one pass over pieces of the batch.

    Returns:
        A 0-dim tensor, dtype of query.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, a target out of range (checked on a
            GPU with FASTM2REC_CHECK=1 only, and not in compiled graphs), no item, or an unknown reduction.
        ImplementationError: `impl` cannot run here.
    """
    expect_alike("query", query, {"weight": weight})
    sizes: dict[str, int] = {}
    expect_shape("query", query, ("B", "D"), sizes)
    expect_shape("weight", weight, ("n_items + 1", "D"), sizes)
    expect_shape("targets", targets, ("B",), sizes)
    if weight.dtype != query.dtype:
        raise TypeError(f"weight: expected {query.dtype}, that of query, got {weight.dtype}")
    if len(weight) < 2:
        raise ValueError(f"weight: expected a row for padding and at least one item, got shape {list(weight.shape)}")
    if targets.dtype != torch.int64 or targets.device != query.device:
        raise TypeError(f"targets: expected int64 on {query.device}, got {targets.dtype} on {targets.device}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    if len(query) and readable(targets):
        low, high = extremes(targets)
        if low < 1 or high >= len(weight):
            raise ValueError(f"targets: expected items from 1 to {len(weight) - 1}, got {low} to {high}")
    return resolve("cross_entropy", impl, query.device)(query, weight, targets, reduction)
