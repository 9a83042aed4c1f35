"""From item ids to query vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._values import extremes, readable
from ..impl import AUTO, resolve
from ._checks import expect_length_values, expect_row_integers

if TYPE_CHECKING:
    from ..folded import Folded


def encode_last(item_ids: Tensor, lengths: Tensor, folded: Folded, *, impl: str = AUTO) -> Tensor:
    """Item ids to query vectors, for inference: a folded one-layer M2Rec, of which only the last position is computed.

    Args:
        item_ids: [B, L] integers, L at most `max_len`: items 1..n_items in the first `lengths[b]` slots of row b; what
            stands behind them is not read.
        lengths: [B] integers, 1 to L.
        folded: the weights, from `fastm2rec.folded.fold`.
        impl: which implementation.

    Returns:
        [B, D], dtype of the folded weights. It has no gradient.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, or values out of range (checked on a GPU
            with FASTM2REC_CHECK=1 only, and not in compiled graphs; otherwise Triton's kernels take padding for a
            wrong id, and the nearest length).
        RuntimeError: folded weights that require a gradient, under grad mode.
        ImplementationError: `impl` cannot run here.
    """
    if item_ids.is_floating_point() or item_ids.is_complex() or item_ids.dtype == torch.bool:
        raise TypeError(f"item_ids: expected integers, got {item_ids.dtype}")
    if item_ids.dim() != 2 or not 1 <= item_ids.shape[1] <= folded.max_len:
        raise ValueError(f"item_ids: expected shape [B, 1..{folded.max_len}], got {list(item_ids.shape)}")
    if item_ids.device != folded.device:
        raise ValueError(f"item_ids: expected device {folded.device}, that of the weights, got {item_ids.device}")
    expect_row_integers(lengths, item_ids.shape[0], item_ids)
    if torch.is_grad_enabled() and folded.requires_grad:
        raise RuntimeError("encode_last is for inference and has no gradient; train with M2Rec.encode")
    encode = resolve("encode_last", impl, item_ids.device)
    checked = None if torch.compiler.is_compiling() else getattr(encode, "checked", None)
    if checked is not None:
        return checked(item_ids, lengths, folded, _expect_values)
    if item_ids.shape[0] and readable(item_ids):
        _expect_values(item_ids, lengths, folded)
    return encode(item_ids.long(), lengths.long(), folded)


def _expect_values(item_ids: Tensor, lengths: Tensor, folded: Folded) -> None:
    expect_length_values(lengths, item_ids.shape[1])
    low, high = extremes(item_ids)
    if low < 1 or high > folded.n_items:  # what stands in the padding may be anything
        real = torch.arange(item_ids.shape[1], device=item_ids.device) < lengths.unsqueeze(1)
        low, high = extremes(item_ids[real])
    if low < 1 or high > folded.n_items:
        raise ValueError(f"item_ids: expected ids from 1 to {folded.n_items}, got {low} to {high}")
