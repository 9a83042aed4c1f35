"""Autocast, of which torch tells its own operators alone."""

from __future__ import annotations

import torch
from torch import Tensor


def as_autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """x, and the others; what is float32 in autocast's dtype where that is active on x's GPU.

    LayerNorm leaves float32 there, so an op behind it would compute, and hand on, twice as much as what torch has in
    its place. On a CPU the engine's kernels compute in float32 anyway.
    """
    if not x.is_cuda or not torch.is_autocast_enabled("cuda"):
        return x, others

    def lowered(one: Tensor) -> Tensor:
        return one.to(torch.get_autocast_dtype("cuda")) if one.dtype == torch.float32 else one

    return lowered(x), tuple(None if one is None else lowered(one) for one in others)
