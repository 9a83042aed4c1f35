"""A Mamba block's output projection and the feed-forward network behind it; and their gradient.

With D_1 to D_3 the factors of dropout and N(v) = (v - mean(v)) / sqrt(var(v) + eps) over the channels:

    n = N(D_1 (y W_out^T + b_out) [+ residual])     x = n w + b
    f = x W_1^T + b_1                               g = D_2 gelu(f)
    m = N(x + D_3 (g W_2^T + b_2))                  out = m w' + b'

A step back through N, v being what it is taken of, and through the products:

    dv = (dn - mean(dn) - n mean(dn n)) / sqrt(var + eps)       dx = dy W       dW = dy^T x

Rows are taken GROUP at a time, which stay in the cache from one end to the other. What the gradient needs of them is
kept (`Kept`), gelu's derivative among it. `backward` leaves the gradients in front of each product (`Slopes`), and the
sums that make the vectors' gradients per group; `weights` makes the matrices' gradients, each row of them from all rows
of the batch. No sum depends on the number of threads.

Arrays are flat and contiguous; E, D and H are multiples of LANES. The factors of dropout are drawn as in
`embed_norm_kernels.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .compiler import entry, part
from .elementary import gelu_slope
from .simd import HALF, LANES, dropped, folded, full, load, store, totals
from .slices import sliced
from .tiles import multiply, transpose

GROUP = 16
UNIT = 32  # rows of a weight's gradient
DEPTH = 256  # rows of the batch that are summed at once
VECTORS = 6  # of D numbers, whose gradients are sums over rows; b_1 comes after them


class Sizes(NamedTuple):
    batch: int
    inner: int  # E
    dim: int  # D
    hidden: int  # H


class Parameters(NamedTuple):
    out_weight: np.ndarray  # [D, E]
    out_bias: np.ndarray  # [D], or none
    norm_weight: np.ndarray  # [D], and the next
    norm_bias: np.ndarray
    fc1_weight: np.ndarray  # [H, D]
    fc1_bias: np.ndarray  # [H], or none
    fc2_weight: np.ndarray  # [D, H]
    fc2_bias: np.ndarray  # [D], or none
    last_weight: np.ndarray  # [D], and the next
    last_bias: np.ndarray


class Dropout(NamedTuple):
    key: int
    threshold: int
    scale: float


class Kept(NamedTuple):
    """What the gradient needs of each row."""

    x: np.ndarray  # [B, D], and the next two
    n: np.ndarray
    m: np.ndarray
    g: np.ndarray  # [B, H], and the next
    slope: np.ndarray  # D_2 gelu'(f)
    inverse: np.ndarray  # [2, B]: 1 / sqrt(var + eps) of both


class Slopes(NamedTuple):
    """The gradients in front of each product."""

    out: np.ndarray  # [B, D]
    fc1: np.ndarray  # [B, H]
    fc2: np.ndarray  # [B, D]


@register_jitable
def kept_size(batch, dim, hidden):
    """Elements of `Kept`."""
    return batch * (3 * dim + 2 * hidden + 2)


def as_kept(flat: np.ndarray, batch: int, dim: int, hidden: int) -> Kept:
    parts = []
    for size in (dim, dim, dim, hidden, hidden, 2):
        parts.append(flat[: batch * size])
        flat = flat[batch * size :]
    return Kept(*parts)


def as_slopes(flat: np.ndarray, batch: int, dim: int, hidden: int) -> Slopes:
    first, second = batch * dim, batch * (dim + hidden)
    return Slopes(flat[:first], flat[first:second], flat[second : second + first])


def scratch_size(dim: int) -> int:
    """Elements that a thread needs."""
    return 2 * GROUP * dim + 2 * HALF * HALF + 2 * HALF


@entry
def transposed(parameters, out, sizes):
    """W_out^T [E, D], W_1^T [D, H] and W_2^T [H, D], one after the other."""
    inner, dim, hidden = sizes.inner, sizes.dim, sizes.hidden
    transpose(parameters.out_weight, dim, inner, out, 0)
    transpose(parameters.fc1_weight, hidden, dim, out, inner * dim)
    transpose(parameters.fc2_weight, dim, hidden, out, (inner + hidden) * dim)


@part
def _thinned(x, start, size, place, dropout):
    """x[start : start + size] times its factors of dropout, which are those of `place`."""
    if dropout.threshold > 0:
        for c in range(0, size, LANES):
            k = dropped(x, place + c, dropout.key, dropout.threshold, dropout.scale)
            store(x, start + c, load(x, start + c) * k)


@part
def _shifted(x, start, rows, dim, bias):
    """x [rows, dim] + bias, in place."""
    if bias.size:
        for i in range(start, start + rows * dim, dim):
            for c in range(0, dim, LANES):
                store(x, i + c, load(x, i + c) + load(bias, c))


@part
def _added(x, start, size, other, place):
    for c in range(0, size, LANES):
        store(x, start + c, load(x, start + c) + load(other, place + c))


@part
def _normalised(x, rows, dim, eps, sums, n, start, inverse, place):
    """n[start:] = N(x), [rows, dim], and inverse[place:] = 1 / sqrt(var + eps), [rows]."""
    square = HALF * HALF
    for first in range(0, rows, HALF):
        count = min(HALF, rows - first)
        for i in range(count):
            row = full(x, 0.0)
            for c in range((first + i) * dim, (first + i + 1) * dim, LANES):
                row = row + load(x, c)
            store(sums, i * HALF, folded(row))
        totals(sums, 0, sums, square)
        for i in range(count):
            mean = sums[square + i] / dim
            row = full(x, 0.0)
            for c in range((first + i) * dim, (first + i + 1) * dim, LANES):
                v = load(x, c) - mean
                store(n, start + c, v)
                row = row + v * v
            store(sums, i * HALF, folded(row))
        totals(sums, 0, sums, square)
        for i in range(count):
            factor = 1.0 / np.sqrt(sums[square + i] / dim + eps)
            inverse[place + first + i] = factor
            for c in range(start + (first + i) * dim, start + (first + i + 1) * dim, LANES):
                store(n, c, load(n, c) * factor)


@part
def _scaled(n, start, rows, dim, weight, bias, out):
    """out[start:] = n w + b, [rows, dim]."""
    for i in range(start, start + rows * dim, dim):
        for c in range(0, dim, LANES):
            store(out, i + c, load(n, i + c) * load(weight, c) + load(bias, c))


@sliced
def forward(first, last, scratch, y, residual, parameters, turned, kept, out, dropout, eps, sizes):
    """out and what is kept, of the groups from `first` to before `last`; `turned` is what `transposed` makes."""
    batch, inner, dim, hidden = sizes.batch, sizes.inner, sizes.dim, sizes.hidden
    v, sums = scratch[: GROUP * dim], scratch[GROUP * dim :]
    fc1, fc2 = inner * dim, (inner + hidden) * dim
    for group in range(first, last):
        begin = group * GROUP
        rows = min(GROUP, batch - begin)
        place, size, wide = begin * dim, rows * dim, begin * hidden
        multiply(y, begin * inner, inner, 1, rows, turned, 0, dim, dim, inner, v, 0, dim, False)
        _shifted(v, 0, rows, dim, parameters.out_bias)
        _thinned(v, 0, size, place, dropout)
        if residual.size:
            _added(v, 0, size, residual, place)
        _normalised(v, rows, dim, eps, sums, kept.n, place, kept.inverse, begin)
        _scaled(kept.n, place, rows, dim, parameters.norm_weight, parameters.norm_bias, kept.x)
        multiply(kept.x, place, dim, 1, rows, turned, fc1, hidden, hidden, dim, kept.g, wide, hidden, False)
        _shifted(kept.g, wide, rows, hidden, parameters.fc1_bias)
        gelu_slope(kept.g, kept.slope, wide, wide + rows * hidden)
        _thinned(kept.g, wide, rows * hidden, batch * dim + wide, dropout)
        _thinned(kept.slope, wide, rows * hidden, batch * dim + wide, dropout)
        multiply(kept.g, wide, hidden, 1, rows, turned, fc2, dim, dim, hidden, v, 0, dim, False)
        _shifted(v, 0, rows, dim, parameters.fc2_bias)
        _thinned(v, 0, size, batch * (dim + hidden) + place, dropout)
        _added(v, 0, size, kept.x, place)
        _normalised(v, rows, dim, eps, sums, kept.m, place, kept.inverse, batch + begin)
        _scaled(kept.m, place, rows, dim, parameters.last_weight, parameters.last_bias, out)


@part
def _normal_slope(d, rows, dim, n, start, inverse, place, weight, sums, dvectors, into):
    """d [rows, dim], the gradient of n w + b, to that of what n is N of, in place; dw and db to dvectors[into:]."""
    square = HALF * HALF
    means, slopes = 2 * square, 2 * square + HALF
    for c in range(0, dim, LANES):
        dw = db = full(d, 0.0)
        for i in range(rows):
            value = load(d, i * dim + c)
            dw, db = dw + value * load(n, start + i * dim + c), db + value
            store(d, i * dim + c, value * load(weight, c))
        store(dvectors, into + c, dw)
        store(dvectors, into + dim + c, db)
    for first in range(0, rows, HALF):
        count = min(HALF, rows - first)
        for i in range(count):
            row = along = full(d, 0.0)
            for c in range((first + i) * dim, (first + i + 1) * dim, LANES):
                row, along = row + load(d, c), along + load(d, c) * load(n, start + c)
            store(sums, i * HALF, folded(row))
            store(sums, square + i * HALF, folded(along))
        totals(sums, 0, sums, means)
        totals(sums, square, sums, slopes)
        for i in range(count):
            mean, slope, factor = sums[means + i] / dim, sums[slopes + i] / dim, inverse[place + first + i]
            for c in range((first + i) * dim, (first + i + 1) * dim, LANES):
                store(d, c, (load(d, c) - mean - load(n, start + c) * slope) * factor)


@part
def _column_sums(x, start, rows, columns, out, to):
    for c in range(0, columns, LANES):
        total = full(x, 0.0)
        for i in range(start + c, start + rows * columns + c, columns):
            total = total + load(x, i)
        store(out, to + c, total)


@part
def _copied(x, start, size, out, place):
    for c in range(0, size, LANES):
        store(out, place + c, load(x, start + c))


@sliced
def backward(first, last, scratch, dout, parameters, kept, slopes, dy, dresidual, dvectors, dropout, sizes):
    """dy, dresidual where there is one, and `slopes` of the groups from `first` to before `last`; of each group the
    gradients of the vectors: w, b, w', b', b_out, b_2 and b_1, [groups, VECTORS D + H]."""
    batch, inner, dim, hidden = sizes.batch, sizes.inner, sizes.dim, sizes.hidden
    v, dx = scratch[: GROUP * dim], scratch[GROUP * dim : 2 * GROUP * dim]
    sums = scratch[2 * GROUP * dim :]
    for group in range(first, last):
        begin, into = group * GROUP, group * (VECTORS * dim + hidden)
        rows = min(GROUP, batch - begin)
        place, size, wide = begin * dim, rows * dim, begin * hidden
        _copied(dout, place, size, dx, 0)
        _normal_slope(
            dx, rows, dim, kept.m, place, kept.inverse, batch + begin, parameters.last_weight, sums, dvectors,
            into + 2 * dim,
        )  # fmt: skip
        _copied(dx, 0, size, slopes.fc2, place)
        _thinned(slopes.fc2, place, size, batch * (dim + hidden) + place, dropout)
        _column_sums(slopes.fc2, place, rows, dim, dvectors, into + 5 * dim)
        multiply(
            slopes.fc2, place, dim, 1, rows, parameters.fc2_weight, 0, hidden, hidden, dim, slopes.fc1, wide, hidden,
            False,
        )  # fmt: skip
        for c in range(wide, wide + rows * hidden, LANES):
            store(slopes.fc1, c, load(slopes.fc1, c) * load(kept.slope, c))
        _column_sums(slopes.fc1, wide, rows, hidden, dvectors, into + VECTORS * dim)
        multiply(
            slopes.fc1, wide, hidden, 1, rows, parameters.fc1_weight, 0, dim, dim, hidden, v, 0, dim, False
        )  # fmt: skip
        _added(dx, 0, size, v, 0)
        _normal_slope(
            dx, rows, dim, kept.n, place, kept.inverse, begin, parameters.norm_weight, sums, dvectors, into
        )  # fmt: skip
        if dresidual.size:
            _copied(dx, 0, size, dresidual, place)
        _copied(dx, 0, size, slopes.out, place)
        _thinned(slopes.out, place, size, place, dropout)
        _column_sums(slopes.out, place, rows, dim, dvectors, into + 4 * dim)
        multiply(
            slopes.out, place, dim, 1, rows, parameters.out_weight, 0, inner, inner, dim, dy, begin * inner, inner,
            False,
        )  # fmt: skip


@part
def _weight_rows(slope, width, row, x, columns, batch, out):
    """`UNIT` rows of slope^T x, from `row`, to out [width, columns]; slope [batch, width], x [batch, columns]."""
    for start in range(0, batch, DEPTH):
        depth = min(DEPTH, batch - start)
        multiply(
            slope, start * width + row, 1, width, UNIT, x, start * columns, columns, columns, depth, out,
            row * columns, columns, start > 0,
        )  # fmt: skip


@sliced
def weights(first, last, scratch, y, kept, slopes, dout_weight, dfc1, dfc2, sizes):
    """The gradients of W_2, W_1 and W_out, of whose 2 D + H rows those of the units from `first` to before `last`."""
    batch, inner, dim, hidden = sizes.batch, sizes.inner, sizes.dim, sizes.hidden
    for unit in range(first, last):
        row = unit * UNIT
        if row < dim:
            _weight_rows(slopes.fc2, dim, row, kept.g, hidden, batch, dfc2)
        elif row < dim + hidden:
            _weight_rows(slopes.fc1, hidden, row - dim, kept.x, dim, batch, dfc1)
        else:
            _weight_rows(slopes.out, dim, row - dim - hidden, y, inner, batch, dout_weight)
