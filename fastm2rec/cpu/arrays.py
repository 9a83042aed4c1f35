"""Tensors as the kernels take them, and memory for the kernels to work in."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np


def as_flat(x: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """As a flat contiguous array; None as an empty one."""
    if x is None:
        return torch.empty(0, dtype=dtype).numpy()
    x = x.detach() if x.requires_grad else x  # the checks are quicker than the calls that they save
    x = x if x.dtype == dtype else x.to(dtype)
    x = x if x.is_contiguous() else x.contiguous()
    return x.numpy().reshape(-1)


def empty_array(size: int, dtype: torch.dtype) -> np.ndarray:
    # torch's memory starts on a cache line; numpy's need not, which can halve the speed.
    return torch.empty(size, dtype=dtype).numpy()


_kept: defaultdict[tuple[torch.dtype, str], list[np.ndarray]] = defaultdict(list)


class scratch:  # noqa: N801 (it reads as a function; a generator's context manager takes three times as long)
    """Memory for one slice, or for another use; it is kept for the next that has the same.

    The system's pages of a new one can cost more than the work.
    """

    __slots__ = ("_array", "_kept", "_wanted")

    def __init__(self, size: int, dtype: torch.dtype, use: str = "slice") -> None:
        self._wanted, self._kept = (size, dtype), _kept[dtype, use]

    def __enter__(self) -> np.ndarray:
        size, dtype = self._wanted
        try:
            self._array = self._kept.pop()
        except IndexError:
            self._array = empty_array(size, dtype)
        if self._array.size < size:
            self._array = empty_array(size, dtype)
        return self._array

    def __exit__(self, failed: object, *_: object) -> None:
        if failed is None:
            self._kept.append(self._array)
