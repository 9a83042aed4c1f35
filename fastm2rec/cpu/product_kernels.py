"""V^T x and V bins for the rows of a batch, by the basis's orbits (`symmetry.py`), and each other's gradients.

A small V is multiplied as it is (`tiles.py`).

The last `extra` positions of x follow the bins, as if V had their unit vectors for columns.

Arrays are flat and contiguous, x [rows, seqlen, dim] and bins [rows, kept + extra, dim]; dim is a multiple of LANES.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .compiler import part
from .parts import write
from .simd import LANES, full, load, store
from .slices import sliced
from .symmetry_kernels import GROUP, contract, expand, mixed
from .tiles import multiply


class Products(NamedTuple):
    """A basis by its orbits, and the sizes of the products with it."""

    basis: np.ndarray  # [orbits, columns]
    positions: np.ndarray  # int64 [slots]
    source: np.ndarray  # int64 [columns], the column of V; -1 for none
    seqlen: int
    kept: int  # columns of V
    classes: int
    orbits: int
    columns: int
    dim: int


@register_jitable
def scratch_size(products):
    """Elements that a row's products need."""
    return (products.columns + products.positions.size) * products.dim


@part
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
            store(out, t * dim + c, p)
            if classes > 1:
                store(out, (orbits + t) * dim + c, q)
            if classes > 2:
                store(out, (2 * orbits + t) * dim + c, r)
                store(out, (3 * orbits + t) * dim + c, s)


@part
def contract_row(x, start, products, extra, bins, folded, out, to):
    """V^T x of one row from x[start:] to out[to:]; scratch bins [columns * dim] and folded [slots * dim]."""
    dim, columns = products.dim, products.columns
    _fold(x, start, products.positions, products.classes, products.orbits, dim, folded)
    contract(products.basis, 0, columns, products.classes, folded, products.orbits, dim, 0, dim, bins)
    for c in range(columns):
        if products.source[c] >= 0:
            for e in range(0, dim, LANES):
                store(out, to + products.source[c] * dim + e, load(bins, e * columns + c * LANES))
    write(x, start + (products.seqlen - extra) * dim, extra * dim, out, to + products.kept * dim)


@part
def expand_row(x, start, products, extra, bins, out, to):
    """V x of one row's bins from x[start:] to out[to:]; scratch bins [columns * dim]."""
    dim, columns = products.dim, products.columns
    for c in range(columns):
        for e in range(0, dim, LANES):
            value = full(bins, 0.0)
            if products.source[c] >= 0:
                value = load(x, start + products.source[c] * dim + e)
            store(bins, e * columns + c * LANES, value)
    for group in range((products.orbits * products.classes + GROUP - 1) // GROUP):
        expand(
            products.basis, 0, columns, products.classes, bins, products.positions, 0, group, products.orbits, dim, 0,
            dim, out, to,
        )  # fmt: skip
    ends = to + (products.seqlen - extra) * dim
    for c in range(0, extra * dim, LANES):
        store(out, ends + c, load(out, ends + c) + load(x, start + products.kept * dim + c))


@part
def _contracted(x, products, extra, bins, folded, out, first, last):
    size, from_ = (products.kept + extra) * products.dim, products.seqlen * products.dim
    for b in range(first, last):
        contract_row(x, b * from_, products, extra, bins, folded, out, b * size)


@part
def _expanded(x, products, extra, bins, out, first, last):
    size, to = (products.kept + extra) * products.dim, products.seqlen * products.dim
    for b in range(first, last):
        expand_row(x, b * size, products, extra, bins, out, b * to)


@sliced
def contracted(first, last, scratch, x, out, products, extra):
    """Bins of the rows from `first` to before `last`; scratch as `scratch_size` says."""
    size = products.columns * products.dim
    _contracted(x, products, extra, scratch[:size], scratch[size:], out, first, last)


@sliced
def expanded(first, last, scratch, x, out, products, extra):
    """The same of the transpose: `x` are bins, `out` is x."""
    _expanded(x, products, extra, scratch[: products.columns * products.dim], out, first, last)


@part
def contract_small_row(x, start, basis, seqlen, kept, extra, dim, out, to):
    """As `contract_row`, of a basis [seqlen, kept]."""
    multiply(basis, 0, 1, kept, kept, x, start, dim, dim, seqlen, out, to, dim, False)
    write(x, start + (seqlen - extra) * dim, extra * dim, out, to + kept * dim)


@part
def expand_small_row(x, start, basis, seqlen, kept, extra, dim, out, to):
    """As `expand_row`, of a basis [seqlen, kept]."""
    multiply(basis, 0, kept, 1, seqlen, x, start, dim, dim, kept, out, to, dim, False)
    ends = to + (seqlen - extra) * dim
    for c in range(0, extra * dim, LANES):
        store(out, ends + c, load(out, ends + c) + load(x, start + kept * dim + c))


@part
def _contract_plainly(x, basis, seqlen, kept, extra, dim, out, first, last):
    for b in range(first, last):
        contract_small_row(x, b * seqlen * dim, basis, seqlen, kept, extra, dim, out, b * (kept + extra) * dim)


@part
def _expand_plainly(x, basis, seqlen, kept, extra, dim, out, first, last):
    for b in range(first, last):
        expand_small_row(x, b * (kept + extra) * dim, basis, seqlen, kept, extra, dim, out, b * seqlen * dim)


@sliced
def contracted_small(first, last, scratch, x, out, basis, seqlen, kept, extra, dim):
    """As `contracted`, of a basis [seqlen, kept]."""
    _contract_plainly(x, basis, seqlen, kept, extra, dim, out, first, last)


@sliced
def expanded_small(first, last, scratch, x, out, basis, seqlen, kept, extra, dim):
    """As `expanded`, of a basis [seqlen, kept]."""
    _expand_plainly(x, basis, seqlen, kept, extra, dim, out, first, last)
