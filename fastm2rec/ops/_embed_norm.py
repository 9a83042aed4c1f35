"""Embedded items as an encoder reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from .._values import extremes, readable
from ..impl import AUTO, resolve
from ._checks import expect_alike, expect_lengths, expect_shape


def embed_norm(
    item_ids: Tensor,
    lengths: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout: float = 0.0,
    *,
    impl: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """`LayerNorm(dropout(table[item_ids]))`, zero at padding; and the same at each row's last real position.

    Args:
        item_ids: [B, L] int64, 0 to V - 1; behind a row's length it does not matter which.
        lengths: [B] integers, 1 to L: later positions are padding.
        table: [V, C], a vector for each item.
        weight: [C], and bias [C], of the LayerNorm.
        eps: of the LayerNorm.
        dropout: probability; drawn from torch's generator, in a way that depends on the implementation.
        impl: which implementation.

    Returns:
        x [B, L, C] and x[:, lengths - 1] [B, C], dtype of the table.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, lengths or ids out of range (checked on the
            CPU, outside compiled graphs), or a dropout outside [0, 1).
        ImplementationError: `impl` cannot run here.
    """
    expect_alike("table", table, {"weight": weight, "bias": bias})
    sizes: dict[str, int] = {}
    expect_shape("table", table, ("V", "C"), sizes)
    expect_shape("item_ids", item_ids, ("B", "L"), sizes)
    expect_shape("weight", weight, ("C",), sizes)
    expect_shape("bias", bias, ("C",), sizes)
    if item_ids.dtype != torch.int64 or item_ids.device != table.device:
        raise TypeError(f"item_ids: expected int64 on {table.device}, got {item_ids.dtype} on {item_ids.device}")
    expect_lengths(lengths, sizes["B"], sizes["L"], table)
    if item_ids.numel() and readable(item_ids):
        low, high = extremes(item_ids)
        if low < 0 or high >= sizes["V"]:
            raise ValueError(f"item_ids: expected 0 to {sizes['V'] - 1}, got {low} to {high}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    return resolve("embed_norm", impl, table.device)(item_ids, lengths, table, weight, bias, eps, dropout)
