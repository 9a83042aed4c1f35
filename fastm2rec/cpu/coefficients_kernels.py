"""From x to a filter's coefficients in the Fourier basis V, and back, in one pass over each row.

    e = (V, last positions)^T x        h = e W^T + o b^T        c = conv(h)

with o = (V, last positions)^T 1; conv is that of `fourier_kernels.py`, the product with V that of `product_kernels.py`.
Gradients run the other way: dh of dc, then de = dh W, which stays in the cache, and dx = V de.

Arrays are flat and contiguous, x [batch, seqlen, C], e [batch, kept + extra, C], h [batch, kept + extra, E], c [batch,
kept, E], with extra = width - 1; C and E are multiples of LANES.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .compiler import entry
from .fourier_kernels import GROUP, convolve_row, convolve_row_backward, sums_size
from .parts import fill
from .product_kernels import Products, contract_row, contract_small_row, expand_row, expand_small_row, scratch_size
from .simd import LANES, at, load, store
from .slices import sliced
from .tiles import multiply, transpose


class Filter(NamedTuple):
    """What all rows share."""

    basis: np.ndarray  # [seqlen, kept]
    products: Products
    small: bool  # is the basis multiplied as it is?
    response: np.ndarray  # as of `fourier_kernels.py`
    bias: np.ndarray  # [E], of the convolution, or none
    offsets: np.ndarray  # [kept], V^T 1, or none
    dim: int  # E
    width: int


@register_jitable
def row_scratch(filter):
    """Elements that a thread needs."""
    products = filter.products
    return scratch_size(products) + (products.kept + filter.width - 1) * products.dim + filter.width * LANES


@entry
def turn(weight, rows, columns, out):
    """weight [rows, columns] as [columns, rows]."""
    transpose(weight, rows, columns, out, 0)


@sliced
def forward(first, last, scratch, x, filter, turned, bias, ones, e, h, out):
    """e, h and c of the rows from `first` to before `last`; `turned` is W^T [C, E], `bias` [E] or none, `ones` o."""
    products, extra, dim = filter.products, filter.width - 1, filter.dim
    seqlen, kept, depth = products.seqlen, products.kept, products.dim
    rows, size = kept + extra, products.columns * depth
    bins, scratch = scratch[:size], scratch[size:]
    folded, edges = scratch[: products.positions.size * depth], scratch[products.positions.size * depth :]
    for b in range(first, last):
        start, to, wide = b * seqlen * depth, b * rows * depth, b * rows * dim
        if filter.small:
            contract_small_row(x, start, filter.basis, seqlen, kept, extra, depth, e, to)
        else:
            contract_row(x, start, products, extra, bins, folded, e, to)
        multiply(e, to, depth, 1, rows, turned, 0, dim, dim, depth, h, wide, dim, False)
        if bias.size:
            for r in range(rows):
                for c in range(0, dim, LANES):
                    store(h, wide + r * dim + c, load(h, wide + r * dim + c) + at(ones, r) * load(bias, c))
        convolve_row(
            h, wide, filter.response, filter.bias, filter.offsets, filter.basis, out, b * kept * dim, kept,
            filter.width, dim, edges,
        )  # fmt: skip


@sliced
def backward(first, last, scratch, dc, h, filter, weight, dh, dx, sums, batch):
    """dh, dx and each group's sums, as of `convolve_row_backward`, of the groups from `first` to before `last`."""
    products, extra, dim = filter.products, filter.width - 1, filter.dim
    seqlen, kept, depth = products.seqlen, products.kept, products.dim
    rows, size = kept + extra, products.columns * depth
    bins, scratch = scratch[:size], scratch[size:]
    de, edges = scratch[: rows * depth], scratch[rows * depth :]
    every = sums_size(kept, filter.width, dim, 1 if filter.offsets.size else 0)
    for group in range(first, last):
        fill(sums, group * every, (group + 1) * every, 0)
        for b in range(group * GROUP, min(batch, (group + 1) * GROUP)):
            wide, to = b * rows * dim, b * seqlen * depth
            convolve_row_backward(
                h, wide, dc, b * kept * dim, filter.response, filter.offsets, filter.basis, dh, sums, group * every,
                kept, filter.width, dim, edges,
            )  # fmt: skip
            multiply(dh, wide, dim, 1, rows, weight, 0, depth, depth, dim, de, 0, depth, False)
            if filter.small:
                expand_small_row(de, 0, filter.basis, seqlen, kept, extra, depth, dx, to)
            else:
                expand_row(de, 0, products, extra, bins, dx, to)
