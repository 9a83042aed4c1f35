"""-log softmax(q W^T) at the targets, summed over rows; and its gradient.

With s = q W^T [rows, items] and p = softmax(s):

    loss = sum over rows of log(sum exp s) - s[target]    ds = p - onehot(target)    dq = ds W    dW = ds^T q

Scores are made for some hundred rows at once, transposed, [items, wide]: the maximum and the sum over items are then
sums of whole registers, and all three products read along rows. Items go in blocks of ITEMS. `scores` leaves
exp(s - m) with m the maximum of its block; what is between that and p is a factor for each block and row.

Row v of the table is item v, row 0 is no item. All sums are taken in an order that depends on sizes alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .compiler import entry, part
from .elementary import LOG2_E, exp2
from .simd import HALF, LANES, full, load, store, where_less
from .slices import sliced
from .tiles import ROWS, multiply

ITEMS = 16 * ROWS
GROUPS = 16  # of blocks, at most; each has its own sum for dq


class Piece(NamedTuple):
    """Some rows of a batch, and what is known of them."""

    weight: np.ndarray  # [items + 1, dim]
    query: np.ndarray  # [rows, dim]
    targets: np.ndarray  # int64 [rows]
    transposed: np.ndarray  # [dim, wide], the query; zero beyond its rows
    scores: np.ndarray  # [items, wide]
    greatest: np.ndarray  # [blocks, wide], of a block's scores; then the factors of its exponentials
    sums: np.ndarray  # [blocks, wide], of a block's exponentials
    totals: np.ndarray  # [3, wide]: the sums, the maximum and the target's score
    start: int  # of the rows in the batch
    rows: int
    items: int
    dim: int
    wide: int  # from one item's scores to the next's


@register_jitable
def _wide(rows):
    """The rows in whole Lanes, and a gap, or the scores of a row would share a few sets of the cache."""
    return (rows + LANES - 1) // LANES * LANES + HALF


@register_jitable
def division(items):
    """Blocks, blocks of a group, groups."""
    blocks = -(-items // ITEMS)
    grouped = -(-blocks // GROUPS)
    return blocks, grouped, -(-blocks // grouped)


def scratch_size(rows: int, items: int, dim: int) -> int:
    """Elements that `piece` and the groups' sums for dq need."""
    blocks, _, groups = division(items)
    return (dim + items + 2 * blocks + 3) * _wide(rows) + groups * rows * dim


def piece(
    weight: np.ndarray, query: np.ndarray, targets: np.ndarray, memory: np.ndarray, start: int, rows: int, items: int,
    dim: int,
) -> Piece:  # fmt: skip
    """The rows of a batch from `start`."""
    wide, blocks = _wide(rows), division(items)[0]
    parts = []
    for size in (dim, items, blocks, blocks, 3):
        parts.append(memory[: size * wide])
        memory = memory[size * wide :]
    query, targets = query[start * dim : (start + rows) * dim], targets[start : start + rows]
    transposed, scores, greatest, sums, totals = parts
    made = Piece(
        weight, query, targets, transposed, scores, greatest, sums, totals, start, rows, items, dim, wide
    )  # fmt: skip
    transpose(made.query, made.transposed, rows, dim, wide)
    return made


@entry
def transpose(query, out, rows, dim, wide):
    for c in range(dim):
        for r in range(wide):
            out[c * wide + r] = query[r * dim + c] if r < rows else 0.0


@part
def _exponentials(piece, place, count, block):
    """exp(s - m) in place of the `count` items' scores from `place`; m, and the sums."""
    wide, scores = piece.wide, piece.scores
    for r in range(0, wide - HALF, LANES):
        most = load(scores, place + r)
        for v in range(1, count):
            s = load(scores, place + v * wide + r)
            most = where_less(s, most, most, s)
        total = full(scores, 0.0)
        for v in range(count):
            value = exp2((load(scores, place + v * wide + r) - most) * LOG2_E)
            store(scores, place + v * wide + r, value)
            total = total + value
        store(piece.greatest, block * wide + r, most)
        store(piece.sums, block * wide + r, total)


@sliced
def scores(first, last, scratch, piece):
    """exp(s - m) of the blocks from `first` to before `last`, their m and sums, and the scores of their targets."""
    dim, wide = piece.dim, piece.wide
    for block in range(first, last):
        item = block * ITEMS
        count, place = min(ITEMS, piece.items - item), item * wide
        multiply(
            piece.weight, (item + 1) * dim, dim, 1, count, piece.transposed, 0, wide, wide - HALF, dim, piece.scores,
            place, wide, False,
        )  # fmt: skip
        for r in range(piece.rows):
            target = piece.targets[r] - 1 - item
            if 0 <= target < count:
                piece.totals[2 * wide + r] = piece.scores[place + target * wide + r]
        _exponentials(piece, place, count, block)


@entry
def normalise(piece, scale):
    """`scale` times the loss; the exponentials' factors are those that make `scale` p of them."""
    wide, greatest, sums, totals = piece.wide, piece.greatest, piece.sums, piece.totals
    end = greatest.size
    loss = 0.0
    for r in range(0, wide - HALF, LANES):
        most = load(greatest, r)
        for place in range(wide + r, end, wide):
            m = load(greatest, place)
            most = where_less(m, most, most, m)
        total = full(sums, 0.0)
        for place in range(r, end, wide):
            factor = exp2((load(greatest, place) - most) * LOG2_E)
            store(greatest, place, factor)
            total = total + factor * load(sums, place)
        for place in range(r, end, wide):
            store(greatest, place, scale * load(greatest, place) / total)
        store(totals, r, total)
        store(totals, wide + r, most)
        for i in range(r, min(r + LANES, piece.rows)):
            loss += math.log(totals[i]) + (totals[wide + i] - totals[2 * wide + i])
    return loss * scale


@part
def _subtract(scale, x, start, dim, out, to):
    """out[to : to + dim] -= scale x[start : start + dim]."""
    for c in range(0, dim, LANES):
        store(out, to + c, load(out, to + c) - load(x, start + c) * scale)


@sliced
def gradients(first, last, scratch, piece, dquery, dweight, scale, of_query, of_weight):
    """dq of the groups from `first` to before `last`, [groups, rows, dim], and dW of their items, or that much more.

    The targets come last: beside their 1 / rows, all that was added after them would be rounded away.
    """
    rows, items, dim, wide, scores = piece.rows, piece.items, piece.dim, piece.wide, piece.scores
    blocks, grouped, _ = division(items)
    for group in range(first, last):
        begin, end, to = group * grouped, min((group + 1) * grouped, blocks), group * rows * dim
        for block in range(begin, end):
            item = block * ITEMS
            count, place, table = min(ITEMS, items - item), item * wide, (item + 1) * dim
            for r in range(0, wide - HALF, LANES):
                factor = load(piece.greatest, block * wide + r)
                for v in range(count):
                    store(scores, place + v * wide + r, load(scores, place + v * wide + r) * factor)
            if of_weight:
                more = piece.start > 0
                multiply(scores, place, wide, 1, count, piece.query, 0, dim, dim, rows, dweight, table, dim, more)
            if of_query:
                more = block > begin
                multiply(scores, place, 1, wide, rows, piece.weight, table, dim, dim, count, dquery, to, dim, more)
        for r in range(rows):
            target = piece.targets[r]
            if begin * ITEMS < target <= end * ITEMS:
                if of_weight:
                    _subtract(scale, piece.query, r * dim, dim, dweight, target * dim)
                if of_query:
                    _subtract(scale, piece.weight, target * dim, dim, dquery, to + r * dim)
