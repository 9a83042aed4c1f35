"""Tensors as the kernels take them, and memory for the kernels to work in."""

from __future__ import annotations

from collections import defaultdict
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
    x = x.detach()  # the checks are quicker than the calls that they save
    x = x if x.dtype == dtype else x.to(dtype)
    x = x if x.is_contiguous() else x.contiguous()
    return x.numpy().reshape(-1)


def empty_array(size: int, dtype: torch.dtype) -> np.ndarray:
    # torch's memory starts on a cache line; numpy's need not, which can halve the speed.
    return torch.empty(size, dtype=dtype).numpy()


_kept: defaultdict[tuple[torch.dtype, str], list[np.ndarray]] = defaultdict(list)


@contextmanager
def scratch(size: int, dtype: torch.dtype, use: str = "slice") -> Iterator[np.ndarray]:
    """Memory for one slice, or for another use; it is kept for the next that has the same.

    The system's pages of a new one can cost more than the work.
    """
    kept = _kept[dtype, use]
    try:
        array = kept.pop()
    except IndexError:
        array = empty_array(size, dtype)
    if array.size < size:
        array = empty_array(size, dtype)
    yield array
    kept.append(array)
