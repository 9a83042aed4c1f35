"""The k best of rows of scores, and those scored again in float64.

A row's best so far are a heap, its worst entry at the root: of all entries none scores lower, and of those that score
the same none has a higher id. Scores are compared with the root a whole register at a time; among a million few are
above it. Items come by rising id, so one that only equals the root never displaces it.
"""

from __future__ import annotations

import numpy as np

from .compiler import entry, inline, part
from .simd import LANES, above, at, bits_set, load, lowest_bit, store, total, where_less, widened
from .slices import sliced

BLOCK = 2 * LANES  # scores that are compared at once
SAMPLE = 4096  # of a row's scores, for a first bound


@inline
def _behind(values, ids, place, value, item):
    """Does the entry at `place` come after another one, in the order of the answer?"""
    own = at(values, place)
    return own < value or (own == value and at(ids, place) > item)


@part
def _sift(values, ids, base, count, place, value, item):
    """Put an entry at `place` of a heap of `count` entries from `base`, or as far below as it belongs."""
    child = 2 * place + 1
    while child < count:
        there = base + child
        if child + 1 < count and _behind(values, ids, there + 1, at(values, there), at(ids, there)):
            child, there = child + 1, there + 1
        if not _behind(values, ids, there, value, item):
            break
        values[base + place], ids[base + place] = at(values, there), at(ids, there)
        place, child = child, 2 * child + 1
    values[base + place], ids[base + place] = value, item


@part
def _heapify(values, ids, base, count):
    for place in range(count // 2 - 1, -1, -1):
        _sift(values, ids, base, count, place, at(values, base + place), at(ids, base + place))


@part
def _put(values, ids, base, count, candidates, value, item):
    """Put an entry into a heap, in the place of the worst one if it is full; how many it has then."""
    if count == candidates:
        _sift(values, ids, base, count, 0, value, item)
        return count
    values[base + count], ids[base + count] = value, item
    if count + 1 == candidates:
        _heapify(values, ids, base, candidates)
    return count + 1


@part
def _bound(scores, begin, columns, candidates, memory):
    """A score that at least as many items are above as there are candidates; NaN if none is at hand.

    The first SAMPLE scores are dealt to as many groups as a block has lanes. Of the groups' maxima, the greatest that
    enough others are above will do. No more than these items and a few enter the heap, a fifth of what would.
    """
    bound = np.float32(np.nan)
    if candidates >= BLOCK or columns < 2 * BLOCK:
        return bound
    a, b = load(scores, begin), load(scores, begin + LANES)
    for place in range(begin + BLOCK, begin + min(columns, SAMPLE) // BLOCK * BLOCK, BLOCK):
        x, y = load(scores, place), load(scores, place + LANES)
        a, b = where_less(x, a, a, x), where_less(y, b, b, y)
    store(memory, 0, a)
    store(memory, LANES, b)
    for i in range(BLOCK):
        value = at(memory, i)
        if bits_set(above(a, value) | above(b, value) << LANES) >= candidates and not value <= bound:
            bound = value
    return bound


@part
def _take(scores, begin, columns, start, values, ids, base, candidates, memory):
    """Take a row's scores of the items from id `start` into its heap; how many NaN are among them."""
    nan, count = 0, min(start - 1, candidates)
    limit = _bound(scores, begin, columns, candidates, memory) if count == 0 else np.nan
    if count == candidates:
        limit = at(values, base)
    whole = columns // BLOCK * BLOCK
    for block in range(0, whole, BLOCK):
        place = begin + block
        bits = above(load(scores, place), limit) | above(load(scores, place + LANES), limit) << LANES
        while bits != 0:
            c = block + lowest_bit(bits)
            bits &= bits - 1
            value = at(scores, begin + c)
            nan += value != value
            if count < candidates or value > at(values, base):
                count = _put(values, ids, base, count, candidates, value, start + c)
                if count == candidates:
                    limit = at(values, base)
    for c in range(whole, columns):
        value = at(scores, begin + c)
        nan += value != value
        if (not value <= limit) if count < candidates else value > at(values, base):
            count = _put(values, ids, base, count, candidates, value, start + c)
    return nan


@part
def _dot(query, q, weight, w, dim):
    """The product of two rows in float64, summed in an order that depends on `dim` alone."""
    whole = dim // LANES * LANES
    result = 0.0
    if whole > 0:
        sums = widened(load(query, q)) * widened(load(weight, w))
        for d in range(LANES, whole, LANES):
            sums = sums + widened(load(query, q + d)) * widened(load(weight, w + d))
        result = total(sums)
    for d in range(whole, dim):
        result += np.float64(at(query, q + d)) * np.float64(at(weight, w + d))
    return result


@part
def _finish(row, values, ids, candidates, query, weight, dim, scores, items, k):
    """Score a row's candidates again, id 0 being none, and write the k best of them; how many scores are NaN."""
    nan, base = 0, row * candidates
    for place in range(base, base + candidates):
        item = at(ids, place)
        values[place] = -np.inf if item == 0 else _dot(query, row * dim, weight, item * dim, dim)
        value = at(values, place)
        nan += value != value
    _heapify(values, ids, base, candidates)
    for last in range(candidates - 1, -1, -1):
        if last < k:
            scores[row * k + last], items[row * k + last] = at(values, base), at(ids, base)
        _sift(values, ids, base, last, 0, at(values, base + last), at(ids, base + last))
    return nan


@sliced
def select(
    first, last, scratch, made, columns, start, final, exhausted, values, ids, candidates, query, weight, dim, scores,
    items, k, nan,
):  # fmt: skip
    """Take the scores `made` [rows, columns] of the items from id `start` into the heaps [rows, candidates].

    After the final ones, do what `finish` does. `exhausted`: a row may have fewer candidates than there is place for.
    """
    for row in range(first, last):
        base = row * candidates
        if _take(made, row * columns, columns, start, values, ids, base, candidates, scratch) > 0:
            nan[0] = 1
        elif final:
            if exhausted:
                for place in range(base, base + candidates):
                    if at(values, place) == -np.inf:
                        ids[place] = 0
            if _finish(row, values, ids, candidates, query, weight, dim, scores, items, k) > 0:
                nan[0] = 1


@sliced
def finish(first, last, scratch, values, ids, candidates, query, weight, dim, scores, items, k, nan):
    """The k best, [rows, k], of the candidates [rows, candidates] by their scores in float64; `values` is memory."""
    for row in range(first, last):
        if _finish(row, values, ids, candidates, query, weight, dim, scores, items, k) > 0:
            nan[0] = 1


@entry
def hide(made, rows, columns, start, n_items, of_rows, of_items):
    """Set to -inf the scores of the pairs (row, item) that are among those `made`, [rows, columns] from id `start`.

    Returns:
        The place of the first pair that cannot be; else how many there are.
    """
    for i in range(of_rows.size):
        row, item = at(of_rows, i), at(of_items, i)
        if row < 0 or row >= rows or item < 1 or item > n_items:
            return i
        if start <= item < start + columns:
            made[row * columns + item - start] = -np.inf
    return of_rows.size
