"""V^T x and V bins for the rows of a batch, by the basis's orbits (`symmetry.py`), and each other's gradients.

The last `extra` positions of x follow the bins, as if V had their unit vectors for columns.

Arrays are flat and contiguous, x [rows, seqlen, dim] and bins [rows, kept + extra, dim]; dim is a multiple of LANES.
"""

from __future__ import annotations

from .borrow import borrower
from .compiler import entry
from .parts import fill, write
from .simd import LANES, full, load, store
from .symmetry_kernels import GROUP, contract, expand, mixed


@borrower
def _fold(x, start, positions, classes, orbits, dim, out):
    """The fold of x from x[start:]."""
    for t in range(orbits):
        slot = t * classes
        a = positions[slot]
        b = positions[slot + 1] if classes > 1 else -1
        d, e = (positions[slot + 2], positions[slot + 3]) if classes > 2 else (-1, -1)
        for c in range(0, dim, LANES):
            p = load(x, start + a * dim + c)
            q = r = s = full(x, 0.0)
            if b >= 0:
                q = load(x, start + b * dim + c)
            if d >= 0:
                r = load(x, start + d * dim + c)
            if e >= 0:
                s = load(x, start + e * dim + c)
            p, q, r, s = mixed(p, q, r, s, classes)
            store(out, slot * dim + c, p)
            if classes > 1:
                store(out, (slot + 1) * dim + c, q)
            if classes > 2:
                store(out, (slot + 2) * dim + c, r)
                store(out, (slot + 3) * dim + c, s)


@borrower
def _contracted(
    x, basis, positions, source, out, bins, folded, first, last, seqlen, kept, extra, classes, orbits, columns, dim
):  # fmt: skip
    for b in range(first, last):
        start, to = b * seqlen * dim, b * (kept + extra) * dim
        _fold(x, start, positions, classes, orbits, dim, folded)
        contract(basis, 0, columns, classes, folded, orbits, dim, bins)
        for c in range(columns):
            if source[c] >= 0:
                write(bins, c * dim, dim, out, to + source[c] * dim)
        write(x, start + (seqlen - extra) * dim, extra * dim, out, to + kept * dim)


@borrower
def _expanded(
    x, basis, positions, source, out, bins, first, last, seqlen, kept, extra, classes, orbits, columns, dim
):  # fmt: skip
    fill(bins, 0, columns * dim, 0)
    for b in range(first, last):
        start, to = b * (kept + extra) * dim, b * seqlen * dim
        for c in range(columns):
            if source[c] >= 0:
                write(x, start + source[c] * dim, dim, bins, c * dim)
        for group in range((orbits * classes + GROUP - 1) // GROUP):
            expand(basis, 0, columns, classes, bins, positions, 0, group, orbits, dim, out, to)
        ends = to + (seqlen - extra) * dim
        for c in range(0, extra * dim, LANES):
            store(out, ends + c, load(out, ends + c) + load(x, start + kept * dim + c))


@entry
def contracted(
    x, basis, positions, source, out, scratch, first, last, seqlen, kept, extra, classes, orbits, columns, dim
):  # fmt: skip
    """Bins of the rows from `first` to before `last`; scratch [columns + slots, dim]."""
    bins, folded = scratch[: columns * dim], scratch[columns * dim :]
    _contracted(
        x, basis, positions, source, out, bins, folded, first, last, seqlen, kept, extra, classes, orbits, columns, dim
    )  # fmt: skip


@entry
def expanded(
    x, basis, positions, source, out, scratch, first, last, seqlen, kept, extra, classes, orbits, columns, dim
):  # fmt: skip
    """The same of the transpose: `x` are bins, `out` is x."""
    bins = scratch[: columns * dim]
    _expanded(
        x, basis, positions, source, out, bins, first, last, seqlen, kept, extra, classes, orbits, columns, dim
    )  # fmt: skip
