"""Tensors as the kernels take them, and memory for the kernels to work in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np


def as_flat(x: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """As a flat contiguous array; None as an empty one."""
    if x is None:
        return torch.empty(0, dtype=dtype).numpy()
    return x.detach().to(dtype).contiguous().view(-1).numpy()


def empty_array(size: int, dtype: torch.dtype) -> np.ndarray:
    # torch's memory starts on a cache line; numpy's need not, which can halve the speed.
    return torch.empty(size, dtype=dtype).numpy()


_kept: dict[torch.dtype, list[np.ndarray]] = {torch.float32: [], torch.float64: []}


@contextmanager
def scratch(size: int, dtype: torch.dtype) -> Iterator[np.ndarray]:
    """Memory for one slice; it is kept for others, as the system's pages of a new one can cost more than the work."""
    try:
        array = _kept[dtype].pop()
    except IndexError:
        array = empty_array(size, dtype)
    if array.size < size:
        array = empty_array(size, dtype)
    yield array
    _kept[dtype].append(array)
