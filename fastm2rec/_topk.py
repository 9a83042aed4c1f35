"""The exact k best of a whole catalogue, in bounded memory; equal scores in the order of the ids.

Scores are made for a chunk of the catalogue at a time. Within a chunk, blocks are ranked by their maxima first: the k
best items lie in the k best blocks, because each of those holds an item that is ahead of everything in the other ones.
That reads a million scores once, where a plain top-k copies and partitions them. On a CPU with numba, kernels of the
CPU engine do it (`cpu/top_k.py`), to the same answer.

The last bits of a matrix product depend on how many rows are multiplied. A few more items than asked for are therefore
scored again, in float64: a row's answer is the same alone and in any batch, and items with equal vectors tie exactly.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from . import cpu

# Scores held at once, rows times items: 16 MB in float32.
_MAX_SCORES = 2**22
# Below this many scores a row, finding blocks costs more than it saves.
_MIN_BLOCKED = 2**14
_BLOCKS = (16, 32, 64, 128, 256)
# Items scored again beyond the k-th: as many may be within a float32 rounding of it.
_SPARE = 4


def top_k(
    queries: Tensor,
    weight: Tensor,
    k: int,
    seen: tuple[Tensor, Tensor] | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best items of each row by dot product: best first, of equal scores the lower id first.

    Args:
        queries: [B, D] floating point.
        weight: [n_items + 1, D] in the same dtype; row 0 is padding and never an answer.
        k: 1 to n_items.
        seen: rows [S] and item ids [S], int64: what is left out of which row's answer, repeats allowed.
        chunk: items scored at once; None takes as many as keep the scores within 16 MB.

    Returns:
        Scores [B, k] in weight's dtype and ids [B, k] int64. A row of which fewer than k items are
        left ends in scores of -inf with ids of 0.

    Raises:
        ValueError: scores that are NaN, or k below 1.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    rows, n_items = len(queries), len(weight) - 1
    fetched = min(k + _SPARE, n_items)
    if chunk is None:
        chunk = max(1, _MAX_SCORES // max(1, rows))
    if _for_kernels(queries, weight):
        return _sound(_engine().top_k(queries, weight, k, fetched, seen, chunk))
    if seen is not None and chunk < n_items:
        order = seen[1].argsort()
        seen = seen[0][order], seen[1][order]
    best: tuple[Tensor, Tensor] | None = None
    for start in range(1, n_items + 1, chunk):
        stop = min(start + chunk, n_items + 1)
        scores = torch.mm(queries, weight[start:stop].t())
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if seen is not None:
            _hide(scores, seen, start, stop, n_items)
        values, columns = leading(scores, min(fetched, stop - start))
        found = values, columns + start
        best = found if best is None else _merged(best, found, fetched)
    assert best is not None
    values, ids = best
    if seen is not None and len(seen[1]) + fetched > n_items:  # else no row can have run out of items
        ids = ids.masked_fill(values == -torch.inf, 0)
    return rescored(queries, weight, ids, k)


def _for_kernels(queries: Tensor, weight: Tensor) -> bool:
    """Do the CPU engine's kernels take these? They read the table as it lies in memory."""
    return (
        queries.is_cpu
        and weight.is_cpu
        and queries.dtype == weight.dtype
        and weight.dtype in (torch.float32, torch.float64)
        and weight.is_contiguous()
        and not torch.compiler.is_compiling()
        and cpu.missing() is None
    )


@functools.cache
def _engine() -> ModuleType:
    """Imported late, as it needs numpy, and once: an import statement takes a microsecond each time."""
    from .cpu import top_k

    return top_k


def leading(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row of scores [B, C] and their columns, [B, k] each: of equal ones the lower columns.

    The highest come first; equal ones stand in any order. NaN counts as higher than every number.
    """
    width = _block(scores.shape[1], k)
    if not width:
        return _leading(scores, k)
    columns = scores.shape[1]
    whole = columns // width * width
    blocks = scores[:, :whole].unflatten(1, (-1, width))
    chosen = leading(blocks.amax(2), k)[1].sort(1).values
    inside = torch.arange(width, device=scores.device)
    candidates = (chosen.unsqueeze(2) * width + inside).flatten(1)
    values = blocks.gather(1, chosen.unsqueeze(2).expand(-1, -1, width)).flatten(1)
    if whole < columns:
        rest = torch.arange(whole, columns, device=scores.device).expand(len(scores), -1)
        candidates, values = torch.cat([candidates, rest], 1), torch.cat([values, scores[:, whole:]], 1)
    values, places = _leading(values, k)
    return values, candidates.gather(1, places)


def _block(columns: int, k: int) -> int:
    """How wide the blocks are: about as many maxima as candidates; 0 where there is nothing to gain."""
    if columns < _MIN_BLOCKED:
        return 0
    width = max((width for width in _BLOCKS if width * width * k <= columns), default=_BLOCKS[0])
    return width if 4 * k * width <= columns else 0


def _leading(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`leading` without blocks."""
    if k == scores.shape[1]:
        return scores.topk(k, dim=1)
    values, columns = scores.topk(k + 1, dim=1)
    # topk may cut through equal values as it likes: the value after the k-th tells.
    cut = values[:, k - 1] == values[:, k]
    values, columns = values[:, :k], columns[:, :k]
    if cut.any():
        ordered, order = scores[cut].sort(dim=1, descending=True, stable=True)
        values[cut], columns[cut] = ordered[:, :k], order[:, :k]
    return values, columns


def _hide(scores: Tensor, seen: tuple[Tensor, Tensor], start: int, stop: int, n_items: int) -> None:
    """Set the scores of items seen to -inf; the columns are the ids from `start` to before `stop`."""
    rows, items = seen
    if stop - start < n_items:  # then they are sorted by id
        first, last = torch.searchsorted(items, torch.tensor([start, stop], device=items.device)).tolist()
        rows, items = rows[first:last], items[first:last]
    scores.index_put_((rows, items - start), scores.new_full((), -torch.inf))


def _merged(best: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of two answers."""
    ids, order = torch.cat([best[1], found[1]], 1).sort(1)
    values, columns = leading(torch.cat([best[0], found[0]], 1).gather(1, order), min(k, ids.shape[1]))
    return values, ids.gather(1, columns)


def rescored(queries: Tensor, weight: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row's candidates `ids` [B, at least k], 0 for none, scored in float64; answers as `top_k`."""
    if _for_kernels(queries, weight):
        return _sound(_engine().rescored(queries, weight, ids, k))
    ids = ids.sort(1).values
    exact = torch.bmm(weight[ids].double(), queries.double().unsqueeze(2)).squeeze(2).to(weight.dtype)
    exact.masked_fill_(ids == 0, -torch.inf)
    values, order = exact.sort(dim=1, descending=True, stable=True)
    nan = values[:, 0].isnan().any()
    return _sound(None if nan else (values[:, :k], ids.gather(1, order[:, :k])))


def _sound(answer: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if answer is None:
        raise ValueError("the model's scores are NaN: its weights, or its text table, are not finite")
    return answer
