"""One position of each row."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Row b's position `positions[b]`: x [B, L, C], positions [B] int64, to [B, C]."""
    index = positions.view(-1, 1, 1).expand(-1, 1, x.shape[2])
    return x.gather(1, index).squeeze(1)


class _WithOne(torch.autograd.Function):
    """x and one position of each row. The gradient of x is copied once; summed, it would be made twice and added."""

    @staticmethod
    def forward(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), take(x, positions)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, dx, done):
        (positions,) = ctx.saved_tensors
        rows = torch.arange(len(positions), device=positions.device)
        return dx.index_put((rows, positions), done, accumulate=True), None


def with_one(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, L, C], and `take(x, positions)`."""
    return _WithOne.apply(x, positions)
