"""Products with a basis by its orbits (`symmetry.py`), on arrays as `parts.py` says.

With G classes, slot t G + i is place i of orbit t, s[g, i] the sign of class g there, and V_g the columns of class g:

    fold:      f[g, t] = sum_i s[g, i] x[t, i]
    contract:  bins_g = V_g^T f_g
    expand:    x[t, i] = sum_g s[g, i] (V_g bins_g)[t]

bins are [tiles, columns, LANES], so that a tile of channels is in one piece: apart by all channels, its rows would fall
on a quarter of the first-level cache's sets.
"""

from __future__ import annotations

from .compiler import inline, part
from .simd import LANES, at, full, load, store
from .symmetry import ORBITS
from .tiles import multiply

BLOCK = 64  # orbits whose products are summed before they are added to the others: long sums lose less
GROUP = 16 * ORBITS  # slots that are expanded together: whole orbits of any kind, ORBITS at a time


@inline
def mixed(a, b, c, d, classes):
    """The sums of an orbit's values with the signs of each class; those of fewer classes are the first."""
    if classes == 4:
        p, q, r, s = a + c, b + d, a - c, b - d
        return p + q, p - q, r - s, r + s
    if classes == 2:
        return a + b, a - b, c, d
    return a, b, c, d


@part
def contract(basis, start, columns, classes, folded, orbits, wide, from_, to, bins):
    """bins = V^T x from the fold of x, [classes, orbits, E]; V from basis[start:]. Of the channels `from_` to `to`."""
    each = columns // classes
    for first in range(0, orbits, BLOCK):
        depth = min(BLOCK, orbits - first)
        for g in range(classes):
            for c in range(from_, to, LANES):
                multiply(
                    basis, start + first * columns + g * each, 1, columns, each,
                    folded, (g * orbits + first) * wide + c, wide, LANES, depth,
                    bins, c * columns + g * each * LANES, LANES, first > 0,
                )  # fmt: skip


@inline
def _put(x, start, position, wide, value):
    if position >= 0:
        store(x, start + position * wide, value)


@inline
def _spread(x, start, positions, slot, wide, classes, a, b, c, d):
    """From the sums of the columns' quarters, each of one class, to the positions of an orbit."""
    if classes == 4:
        p, q, r, s = a + b, a - b, c + d, c - d
        _put(x, start, at(positions, slot), wide, p + r)
        _put(x, start, at(positions, slot + 1), wide, q - s)
        _put(x, start, at(positions, slot + 2), wide, p - r)
        _put(x, start, at(positions, slot + 3), wide, q + s)
    elif classes == 2:
        _put(x, start, at(positions, slot), wide, (a + b) + (c + d))
        _put(x, start, at(positions, slot + 1), wide, (a + b) - (c + d))
    else:
        _put(x, start, at(positions, slot), wide, (a + b) + (c + d))


@part
def expand(basis, start, columns, classes, bins, positions, place, group, orbits, wide, from_, to, x, base):
    """x = V bins at the positions of one group of slots, to x[base:]; they are those at positions[place:].

    Of the channels `from_` to `to`.
    """
    first, last = group * GROUP // classes, min((group + 1) * GROUP // classes, orbits)
    quarter = columns // 4
    for c in range(from_, to, LANES):
        for t in range(first, last, ORBITS):
            p = start + t * columns
            q, r = p + columns, p + 2 * columns
            a0 = b0 = d0 = e0 = a1 = b1 = d1 = e1 = a2 = b2 = d2 = e2 = full(x, 0.0)
            for k in range(quarter):
                v = load(bins, c * columns + k * LANES)
                a0, a1, a2 = a0 + at(basis, p + k) * v, a1 + at(basis, q + k) * v, a2 + at(basis, r + k) * v
                k += quarter
                v = load(bins, c * columns + k * LANES)
                b0, b1, b2 = b0 + at(basis, p + k) * v, b1 + at(basis, q + k) * v, b2 + at(basis, r + k) * v
                k += quarter
                v = load(bins, c * columns + k * LANES)
                d0, d1, d2 = d0 + at(basis, p + k) * v, d1 + at(basis, q + k) * v, d2 + at(basis, r + k) * v
                k += quarter
                v = load(bins, c * columns + k * LANES)
                e0, e1, e2 = e0 + at(basis, p + k) * v, e1 + at(basis, q + k) * v, e2 + at(basis, r + k) * v
            slot = place + t * classes
            _spread(x, base + c, positions, slot, wide, classes, a0, b0, d0, e0)
            _spread(x, base + c, positions, slot + classes, wide, classes, a1, b1, d1, e1)
            _spread(x, base + c, positions, slot + 2 * classes, wide, classes, a2, b2, d2, e2)
