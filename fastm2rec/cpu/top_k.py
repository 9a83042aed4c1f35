"""`top_k` on a CPU: what the kernels in `top_k_kernels.py` need around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .arrays import as_flat
from .threads import run

if TYPE_CHECKING:
    Pairs = tuple[np.ndarray, np.ndarray]

LOOKED_AT = 2**15  # scores that are worth a slice: some ten microseconds
MULTIPLY_ADDS = 2**15  # likewise, of scoring again


def top_k(
    queries: Tensor, weight: Tensor, k: int, fetched: int, seen: tuple[Tensor, Tensor] | None, chunk: int
) -> tuple[Tensor, Tensor] | None:
    """As `fastm2rec._topk.top_k`, of `fetched` candidates a row; None where a score is NaN."""
    from . import top_k_kernels as kernels

    rows, n_items, dtype = len(queries), len(weight) - 1, weight.dtype
    pairs = None if seen is None else _pairs(*seen)
    exhausted = pairs is not None and len(pairs[0]) + fetched > n_items  # else no row can have run out of items
    answer = _Answer(queries, weight, fetched, k)
    for start in range(1, n_items + 1, chunk):
        stop = min(start + chunk, n_items + 1)
        scores = F.linear(queries, weight[start:stop])  # torch.mm, the transpose without a step in Python
        made = as_flat(scores, dtype)
        if pairs is not None:
            done = kernels.hide(made, rows, stop - start, start, n_items, *pairs)
            if done < len(pairs[0]):
                row, item = (int(array[done]) for array in pairs)
                raise IndexError(f"seen: expected rows 0..{rows - 1} and items 1..{n_items}, got {row} and {item}")
        arguments = (made, stop - start, start, stop > n_items, exhausted, *answer.arguments)
        run(kernels.select, arguments, rows, max(1, LOOKED_AT // (stop - start)), kernels.BLOCK, dtype)
        if answer.nan[0]:
            return None
    return answer.tensors()


def rescored(queries: Tensor, weight: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """As `fastm2rec._topk.rescored`; None where a score is NaN."""
    from . import top_k_kernels as kernels

    if queries.shape != (len(ids), weight.shape[1]):
        expected = [len(ids), weight.shape[1]]
        raise ValueError(f"queries: expected shape {expected}, as ids and weight have, got {list(queries.shape)}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(weight):
        raise IndexError(f"ids: expected 0..{len(weight) - 1}, got {int(ids.min())} to {int(ids.max())}")
    answer = _Answer(queries, weight, ids.shape[1], k)
    answer.ids[:] = as_flat(ids, torch.int64)
    grain = max(1, MULTIPLY_ADDS // max(1, ids.shape[1] * weight.shape[1]))
    run(kernels.finish, answer.arguments, len(queries), grain, 0, weight.dtype)
    return answer.tensors()


class _Answer:
    """The candidates of each row and the k best of them, as the kernels take both."""

    def __init__(self, queries: Tensor, weight: Tensor, candidates: int, k: int) -> None:
        (rows, dim), k = queries.shape, min(k, candidates)
        table = as_flat(weight, weight.dtype)
        values, self.ids = np.empty(rows * candidates, table.dtype), np.empty(rows * candidates, np.int64)
        self._scores, self._items = np.empty((rows, k), table.dtype), np.empty((rows, k), np.int64)
        self.nan = np.zeros(1, np.int64)
        self.arguments: tuple[Any, ...] = (
            values, self.ids, candidates, as_flat(queries, weight.dtype), table, dim, self._scores.reshape(-1),
            self._items.reshape(-1), k, self.nan,
        )  # fmt: skip

    def tensors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.nan[0] else (torch.from_numpy(self._scores), torch.from_numpy(self._items))


def _pairs(rows: Tensor, items: Tensor) -> Pairs:
    if rows.shape != items.shape:
        raise ValueError(f"seen: expected as many rows as items, got {list(rows.shape)} and {list(items.shape)}")
    return as_flat(rows, torch.int64), as_flat(items, torch.int64)
