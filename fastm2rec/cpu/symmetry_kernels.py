"""Products with a basis by its orbits (`symmetry.py`), on arrays as `parts.py` says.

With G classes, slot t G + i is place i of orbit t, and s[g, i] the sign of class g there:

    fold:      f[t, g] = sum_i s[g, i] x[t, i]
    contract:  bins[c] = sum_t V[t, c] f[t, c mod G]
    expand:    x[t, i] = sum_g s[g, i] sum_{c mod G = g} V[t, c] bins[c]
"""

from __future__ import annotations

from .compiler import inline, part
from .parts import ROWS, accumulate_products, fill
from .simd import LANES, at, full, load, store

BLOCK = 32  # orbits whose products are summed before they are added to the others: long sums lose less
GROUP = 64  # slots that are expanded together


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
def contract(basis, start, columns, classes, folded, orbits, wide, bins):
    """bins [columns, E] = V^T x from the fold of x, [slots, E], over the first `orbits`; V from basis[start:]."""
    fill(bins, 0, columns * wide, 0)
    second, third, fourth = 1 % classes * wide, 2 % classes * wide, 3 % classes * wide
    for first in range(0, orbits, BLOCK):
        last = min(first + BLOCK, orbits)
        for c in range(0, wide, LANES):
            for k in range(0, columns, ROWS):
                a = b = d = e = f = g = h = i = full(bins, 0.0)
                for t in range(first, last):
                    row = t * classes * wide + c
                    p, q = load(folded, row), load(folded, row + second)
                    r, s = load(folded, row + third), load(folded, row + fourth)
                    place = start + t * columns + k
                    a = a + at(basis, place) * p
                    b = b + at(basis, place + 1) * q
                    d = d + at(basis, place + 2) * r
                    e = e + at(basis, place + 3) * s
                    f = f + at(basis, place + 4) * p
                    g = g + at(basis, place + 5) * q
                    h = h + at(basis, place + 6) * r
                    i = i + at(basis, place + 7) * s
                accumulate_products(bins, k * wide + c, wide, a, b, d, e, f, g, h, i)


@inline
def _put(x, start, position, wide, value):
    if position >= 0:
        store(x, start + position * wide, value)


@inline
def _spread(x, start, positions, slot, wide, classes, a, b, c, d):
    """From four sums, of every fourth column each, to the positions of an orbit."""
    if classes == 4:
        p, q, r, s = a + b, a - b, c + d, c - d
        _put(x, start, at(positions, slot), wide, p + r)
        _put(x, start, at(positions, slot + 1), wide, q - s)
        _put(x, start, at(positions, slot + 2), wide, p - r)
        _put(x, start, at(positions, slot + 3), wide, q + s)
    elif classes == 2:
        _put(x, start, at(positions, slot), wide, (a + c) + (b + d))
        _put(x, start, at(positions, slot + 1), wide, (a + c) - (b + d))
    else:
        _put(x, start, at(positions, slot), wide, (a + c) + (b + d))


@part
def expand(basis, start, columns, classes, bins, positions, place, group, orbits, wide, x, to):
    """x = V bins at the positions of one group of slots, to x[to:]; they are those at positions[place:]."""
    first, last = group * GROUP // classes, min((group + 1) * GROUP // classes, orbits)
    for c in range(0, wide, LANES):
        for t in range(first, last, 2):
            p, q = start + t * columns, start + (t + 1) * columns
            a = b = d = e = f = g = h = i = full(x, 0.0)
            for k in range(0, columns, 4):
                v, w = load(bins, k * wide + c), load(bins, (k + 1) * wide + c)
                y, z = load(bins, (k + 2) * wide + c), load(bins, (k + 3) * wide + c)
                a = a + at(basis, p + k) * v
                b = b + at(basis, p + k + 1) * w
                d = d + at(basis, p + k + 2) * y
                e = e + at(basis, p + k + 3) * z
                f = f + at(basis, q + k) * v
                g = g + at(basis, q + k + 1) * w
                h = h + at(basis, q + k + 2) * y
                i = i + at(basis, q + k + 3) * z
            slot = place + t * classes
            _spread(x, to + c, positions, slot, wide, classes, a, b, d, e)
            _spread(x, to + c, positions, slot + classes, wide, classes, f, g, h, i)
