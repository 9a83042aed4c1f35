"""x = LayerNorm(dropout(e)) at the real positions of a batch, zero at the others; and its gradient.

With v = e k, k being 0 or 1 / (1 - p) for each number, and n = (v - mean) / sqrt(var + eps) over the channels:

    x = n w + b        g = w dx        de = k (g - mean(g) - n mean(g n)) / sqrt(var + eps)        dw = sum dx n

k is not kept but drawn again: it is a function of a key and of the number's place. e [B, L, C] is flat and contiguous,
C a multiple of LANES. The sums of dw and db are left per group of GROUP rows.
"""

from __future__ import annotations

import numpy as np

from .compiler import entry, part
from .parts import fill
from .simd import LANES, dropped, full, load, store, total

GROUP = 8


@part
def _normalised(e, place, dim, key, threshold, scale, eps, kept, n):
    """k and n of the position at `place`, [dim] each; returns 1 / sqrt(var + eps)."""
    row = full(e, 0.0)
    for c in range(0, dim, LANES):
        k = dropped(e, place + c, key, threshold, scale)
        store(kept, c, k)
        v = load(e, place + c) * k
        store(n, c, v)
        row = row + v
    mean = total(row) / dim
    row = full(e, 0.0)
    for c in range(0, dim, LANES):
        v = load(n, c) - mean
        store(n, c, v)
        row = row + v * v
    inverse = 1.0 / np.sqrt(total(row) / dim + eps)
    for c in range(0, dim, LANES):
        store(n, c, load(n, c) * inverse)
    return inverse


@entry
def forward(e, lengths, weight, bias, x, scratch, key, threshold, scale, eps, first, last, seqlen, dim):
    """x of the rows from `first` to before `last`."""
    kept, n = scratch[:dim], scratch[dim : 2 * dim]
    for b in range(first, last):
        for t in range(seqlen):
            place = (b * seqlen + t) * dim
            if t >= lengths[b]:
                fill(x, place, place + dim, 0)
                continue
            _normalised(e, place, dim, key, threshold, scale, eps, kept, n)
            for c in range(0, dim, LANES):
                store(x, place + c, load(n, c) * load(weight, c) + load(bias, c))


@entry
def backward(
    e, lengths, weight, dx, de, dweight, dbias, scratch, key, threshold, scale, eps, first, last, batch, seqlen, dim
):
    """de, and the sums dweight and dbias [groups, dim], of the groups from `first` to before `last`."""
    kept, n, g = scratch[:dim], scratch[dim : 2 * dim], scratch[2 * dim : 3 * dim]
    for group in range(first, last):
        into = group * dim
        fill(dweight, into, into + dim, 0)
        fill(dbias, into, into + dim, 0)
        for b in range(group * GROUP, min(batch, (group + 1) * GROUP)):
            for t in range(seqlen):
                place = (b * seqlen + t) * dim
                if t >= lengths[b]:
                    fill(de, place, place + dim, 0)
                    continue
                inverse = _normalised(e, place, dim, key, threshold, scale, eps, kept, n)
                row = along = full(e, 0.0)
                for c in range(0, dim, LANES):
                    d = load(dx, place + c)
                    store(dweight, into + c, load(dweight, into + c) + d * load(n, c))
                    store(dbias, into + c, load(dbias, into + c) + d)
                    d = d * load(weight, c)
                    store(g, c, d)
                    row = row + d
                    along = along + d * load(n, c)
                mean, slope = total(row) / dim, total(along) / dim
                for c in range(0, dim, LANES):
                    d = (load(g, c) - mean - load(n, c) * slope) * inverse
                    store(de, place + c, d * load(kept, c))
