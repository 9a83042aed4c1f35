"""A batch of items as an encoder reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..impl import AUTO, resolve
from ._checks import expect_alike, expect_lengths, expect_shape


def embed_norm(
    table: Tensor,
    item_ids: Tensor,
    lengths: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout: float = 0.0,
    *,
    impl: str = AUTO,
) -> Tensor:
    """`LayerNorm(dropout(table[item_ids]))`, zero at padding.

    Args:
        table: [n_items + 1, C].
        item_ids: [B, L] int64, 0 to n_items.
        lengths: [B] integers, 1 to L: later positions are padding.
        weight: [C], and bias [C], of the LayerNorm.
        eps: of the LayerNorm.
        dropout: probability; drawn from torch's generator, in a way that depends on the implementation.
        impl: which implementation.

    Returns:
        [B, L, C], dtype of the table.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, lengths out of range (checked on the CPU,
            outside compiled graphs), or a dropout outside [0, 1).
        IndexError: an id beyond the table, on a CPU.
        ImplementationError: `impl` cannot run here.
    """
    expect_alike("table", table, {"weight": weight, "bias": bias})
    if item_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"item_ids: expected int32 or int64, got {item_ids.dtype}")
    sizes: dict[str, int] = {}
    for name, tensor, shape in (
        ("table", table, ("rows", "C")), ("item_ids", item_ids, ("B", "L")), ("weight", weight, ("C",)),
        ("bias", bias, ("C",)),
    ):  # fmt: skip
        expect_shape(name, tensor, shape, sizes)
    if item_ids.device != table.device:
        raise ValueError(f"item_ids: expected device {table.device}, that of the table, got {item_ids.device}")
    expect_lengths(lengths, sizes["B"], sizes["L"], item_ids)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    return resolve("embed_norm", impl, table.device)(table, item_ids, lengths, weight, bias, eps, dropout)
