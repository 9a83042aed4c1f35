"""x = LayerNorm(dropout(e)) at the real positions of a batch, zero at the others; and its gradient.

With v = e k, k being 0 or 1 / (1 - p) for each number, and n = (v - mean) / sqrt(var + eps) over the channels:

    x = n w + b        g = w dx        de = k (g - mean(g) - n mean(g n)) / sqrt(var + eps)        dw = sum dx n

k is not kept but drawn again: it is a function of a key and of the number's place. e [B, L, C] is flat and contiguous,
C a multiple of LANES. The sums of dw and db are left per group of GROUP rows.

Positions are taken HALF at a time, as many as `totals` sums at once: one sum after the other takes longer than all else
does together.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from .compiler import entry, part
from .parts import fill
from .simd import HALF, LANES, dropped, folded, full, load, load_half, store, totals

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
def _normalised(e, place, rows, dim, key, threshold, scale, eps, kept, n, sums, inverse):
    """k, centred v and 1 / sqrt(var + eps) of `rows` positions from `place`, [rows, dim] and [rows].

    k is written only where something may be dropped.
    """
    for i in range(rows):
        row = full(e, 0.0)
        for c in range(i * dim, (i + 1) * dim, LANES):
            v = load(e, place + c)
            if threshold > 0:
                k = dropped(e, place + c, key, threshold, scale)
                store(kept, c, k)
                v = v * k
            store(n, c, v)
            row = row + v
        store(sums, i * HALF, folded(row))
    totals(sums, 0, inverse, 0)
    for i in range(rows):
        mean = inverse[i] / dim
        row = full(e, 0.0)
        for c in range(i * dim, (i + 1) * dim, LANES):
            v = load(n, c) - mean
            store(n, c, v)
            row = row + v * v
        store(sums, i * HALF, folded(row))
    totals(sums, 0, inverse, 0)
    for i in range(rows):
        inverse[i] = 1.0 / np.sqrt(inverse[i] / dim + eps)


@entry
def forward(e, lengths, weight, bias, x, scratch, key, threshold, scale, eps, first, last, seqlen, dim):
    """x of the rows from `first` to before `last`."""
    block = _block(dim)
    kept, n, scratch = scratch[:block], scratch[block : 2 * block], scratch[2 * block :]
    sums, inverse = scratch[: HALF * HALF], scratch[HALF * HALF :]
    for b in range(first, last):
        length = min(max(lengths[b], 0), seqlen)
        for t in range(0, length, HALF):
            rows, place = min(HALF, length - t), (b * seqlen + t) * dim
            _normalised(e, place, rows, dim, key, threshold, scale, eps, kept, n, sums, inverse)
            for i in range(rows):
                for c in range(0, dim, LANES):
                    value = load(n, i * dim + c) * inverse[i] * load(weight, c) + load(bias, c)
                    store(x, place + i * dim + c, value)
        fill(x, (b * seqlen + length) * dim, (b + 1) * seqlen * dim, 0)


@entry
def backward(
    e, lengths, weight, dx, de, dweight, dbias, scratch, key, threshold, scale, eps, first, last, batch, seqlen, dim
):
    """de, and the sums dweight and dbias [groups, dim], of the groups from `first` to before `last`."""
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
                rows, place = min(HALF, length - t), (b * seqlen + t) * dim
                _normalised(e, place, rows, dim, key, threshold, scale, eps, kept, n, sums, inverse)
                fill(sums, 0, rows * HALF, 0)
                fill(along, 0, rows * HALF, 0)
                for c in range(0, dim, LANES):
                    w, dw, db = load(weight, c), load(dweight, into + c), load(dbias, into + c)
                    for i in range(rows):
                        d, value = load(dx, place + i * dim + c), load(n, i * dim + c) * inverse[i]
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
            fill(de, (b * seqlen + length) * dim, (b + 1) * seqlen * dim, 0)
