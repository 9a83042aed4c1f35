"""x = LayerNorm(dropout(e)) at the real positions of a batch, zero at the others; and its gradient.

With e = table[ids], v = e k, k being 0 or 1 / (1 - p) for each number, and over the channels
n = (v - mean) / sqrt(var + eps):

    x = n w + b        g = w dx        de = k (g - mean(g) - n mean(g n)) / sqrt(var + eps)        dw = sum dx n

k is not kept but drawn again: it is a function of a key and of the number's place. Arrays are flat and contiguous, C a
multiple of LANES. The sums of dw and db are left per group of GROUP rows.

The table's gradient is the sum of de over an item's places in their order, whatever the number of threads: `places`
sorts them by item.

Positions are taken HALF at a time, as many as `totals` sums at once: one sum after the other takes longer than all else
does together.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from .compiler import entry, part
from .parts import fill, write
from .simd import HALF, LANES, at, dropped, folded, full, load, load_half, store, totals
from .slices import sliced

GROUP = 8


@register_jitable
def _block(dim):
    """HALF positions, and a gap: arrays whole pages apart would be taken for each other by the processor."""
    return HALF * dim + LANES


@register_jitable
def scratch_size(dim):
    """Elements that `forward` or `backward` needs."""
    return 3 * _block(dim) + 2 * HALF * HALF + 3 * HALF


@part
def _normalised(ids, table, position, rows, dim, key, threshold, scale, eps, kept, n, sums, inverse):
    """k, centred v and 1 / sqrt(var + eps) of `rows` positions from `position`, [rows, dim] and [rows].

    k is written only where something may be dropped.
    """
    for i in range(rows):
        row = full(table, 0.0)
        item, place, own = at(ids, position + i) * dim, (position + i) * dim, i * dim
        for c in range(0, dim, LANES):
            v = load(table, item + c)
            if threshold > 0:
                k = dropped(table, place + c, key, threshold, scale)
                store(kept, own + c, k)
                v = v * k
            store(n, own + c, v)
            row = row + v
        store(sums, i * HALF, folded(row))
    totals(sums, 0, inverse, 0)
    for i in range(rows):
        mean = inverse[i] / dim
        row = full(table, 0.0)
        for c in range(i * dim, (i + 1) * dim, LANES):
            v = load(n, c) - mean
            store(n, c, v)
            row = row + v * v
        store(sums, i * HALF, folded(row))
    totals(sums, 0, inverse, 0)
    for i in range(rows):
        inverse[i] = 1.0 / np.sqrt(inverse[i] / dim + eps)


@sliced
def forward(
    first, last, scratch, ids, lengths, table, weight, bias, x, newest, key, threshold, scale, eps, seqlen, dim
):
    """x of the rows from `first` to before `last`, and each row's last of it."""
    block = _block(dim)
    kept, n, scratch = scratch[:block], scratch[block : 2 * block], scratch[2 * block :]
    sums, inverse = scratch[: HALF * HALF], scratch[HALF * HALF :]
    for b in range(first, last):
        length = min(max(lengths[b], 0), seqlen)
        for t in range(0, length, HALF):
            rows, position = min(HALF, length - t), b * seqlen + t
            place = position * dim
            _normalised(ids, table, position, rows, dim, key, threshold, scale, eps, kept, n, sums, inverse)
            for i in range(rows):
                for c in range(0, dim, LANES):
                    value = load(n, i * dim + c) * inverse[i] * load(weight, c) + load(bias, c)
                    store(x, place + i * dim + c, value)
        fill(x, (b * seqlen + length) * dim, (b + 1) * seqlen * dim, 0)
        write(x, (b * seqlen + length - 1) * dim, dim, newest, b * dim)


@sliced
def backward(
    first, last, scratch, ids, lengths, table, weight, dx, dnewest, de, dweight, dbias, key, threshold, scale, eps,
    batch, seqlen, dim,
):  # fmt: skip
    """de at real positions, and sums dweight and dbias [groups, dim], of the groups from `first` to before `last`."""
    block = _block(dim)
    kept, n, scratch = scratch[:block], scratch[block : 2 * block], scratch[2 * block :]
    g, scratch = scratch[:block], scratch[block:]
    sums, along, scratch = scratch[: HALF * HALF], scratch[HALF * HALF : 2 * HALF * HALF], scratch[2 * HALF * HALF :]
    inverse, means, slopes = scratch[:HALF], scratch[HALF : 2 * HALF], scratch[2 * HALF :]
    for group in range(first, last):
        into = group * dim
        fill(dweight, into, into + dim, 0)
        fill(dbias, into, into + dim, 0)
        for b in range(group * GROUP, min(batch, (group + 1) * GROUP)):
            length = min(max(lengths[b], 0), seqlen)
            for t in range(0, length, HALF):
                rows, position = min(HALF, length - t), b * seqlen + t
                place = position * dim
                _normalised(ids, table, position, rows, dim, key, threshold, scale, eps, kept, n, sums, inverse)
                fill(sums, 0, rows * HALF, 0)
                fill(along, 0, rows * HALF, 0)
                for c in range(0, dim, LANES):
                    w, dw, db = load(weight, c), load(dweight, into + c), load(dbias, into + c)
                    for i in range(rows):
                        d, value = load(dx, place + i * dim + c), load(n, i * dim + c) * inverse[i]
                        if t + i == length - 1:
                            d = d + load(dnewest, b * dim + c)
                        store(n, i * dim + c, value)
                        dw, db = dw + d * value, db + d
                        d = d * w
                        store(g, i * dim + c, d)
                        store(sums, i * HALF, load_half(sums, i * HALF) + folded(d))
                        store(along, i * HALF, load_half(along, i * HALF) + folded(d * value))
                    store(dweight, into + c, dw)
                    store(dbias, into + c, db)
                totals(sums, 0, means, 0)
                totals(along, 0, slopes, 0)
                for i in range(rows):
                    mean, slope = means[i] / dim, slopes[i] / dim
                    for c in range(i * dim, (i + 1) * dim, LANES):
                        d = (load(g, c) - mean - load(n, c) * slope) * inverse[i]
                        if threshold > 0:
                            d = d * load(kept, c)
                        store(de, place + c, d)


@entry
def places(ids, lengths, starts, found, batch, seqlen):
    """The real positions sorted by item: those of item v are found[starts[v] : starts[v + 1]], in their order.

    starts [V + 2] and found [B L] int64.
    """
    items = starts.size - 2
    for v in range(items + 2):
        starts[v] = 0
    for b in range(batch):
        for t in range(b * seqlen, b * seqlen + min(max(lengths[b], 0), seqlen)):
            starts[ids[t] + 2] += 1
    for v in range(2, items + 2):
        starts[v] += starts[v - 1]
    for b in range(batch):
        for t in range(b * seqlen, b * seqlen + min(max(lengths[b], 0), seqlen)):
            found[starts[ids[t] + 1]] = t
            starts[ids[t] + 1] += 1


@sliced
def gather(first, last, scratch, de, starts, found, dtable, dim):
    """The sums of de over the places of the items from `first` to before `last`."""
    for v in range(first, last):
        for c in range(0, dim, LANES):
            total = full(de, 0.0)
            for i in range(starts[v], starts[v + 1]):
                total = total + load(de, at(found, i) * dim + c)
            store(dtable, v * dim + c, total)
