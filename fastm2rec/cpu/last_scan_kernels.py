"""The last position's scan from the convolution's output on: one pass over each row.

    u = silu(p)      delta, B, C = x_proj(u)      dt = softplus(dt_proj(delta))      T_t = sum_{s > t} dt_s
    y = sum_t dt_t u_t sum_n C_n B_tn exp(A_n T_t) + D u_last, then y * silu(z)

C and u_last are those of the row's last position; t runs over every stride-th position, counted back from it. The
gradient is in `last_scan_gradients.py`.

Eight positions at a time, backward in time, so that T is known; all that is made of p for them stays in the first-level
cache. Within them a tile of channels is in registers, with its T and y.

A state whose decay has come to nothing in all channels of a tile is struck out, for good: T only grows on the way back.
When none is left, earlier positions have neither weight nor gradient. How soon that comes depends on the step sizes:
right after the start most states are gone within a few positions, in trained models slow channels keep their tile
alive. So channels should come in the order of their decay.

Sums over time and over rows are compensated (Kahan): without that 1600 positions lose 2e-6.

With a basis, p are the coefficients of each row in it, and the row is made of them in the cache (`product_kernels.py`).

Arrays are as `parts.py` says.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from .parts import (
    ROWS,
    as_scan,
    as_weights,
    fill,
    forget,
    padded,
    read,
    scan_block,
    scan_size,
    scanned,
    silu,
    start_scan,
)
from .product_kernels import expand_row
from .simd import at, put
from .slices import sliced


@register_jitable
def forward_scratch(products, dim, dstate, dt_rank):
    """Elements that `forward` needs."""
    filtered = (products.seqlen + products.columns) * dim
    return (ROWS + 2) * padded(dim) + scan_size(dim, dstate, dt_rank) + filtered


@sliced
def forward(
    first, last, scratch, p, products, lengths, z, y, low_rank, order, weights, transposed, seqlen, dim, dstate,
    dt_rank, stride, has_z,
):  # fmt: skip
    """y of the rows from `first` to before `last`; NaN where a length is not in 1..seqlen.

    p is [batch, seqlen, dim] or, where the products have columns, [batch, kept, dim].
    Channel e of p is channel order[e] of z and y. Delta and B of each position, the last one first, go to `low_rank`
    [batch, ceil(seqlen / stride), dt_rank + dstate], unless that is empty; 0 for what was forgotten.
    """
    wide = padded(dim)
    w = as_weights(weights, dim, dstate, dt_rank)
    u, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    gate, scratch = scratch[:wide], scratch[wide:]
    value, scratch = scratch[:wide], scratch[wide:]
    filtered = products.columns > 0
    row, bins = scratch[: products.seqlen * dim], scratch[products.seqlen * dim :]
    scan = as_scan(scratch[(products.seqlen + products.columns) * dim :], dim, dstate, dt_rank)
    kept, columns, slots = dt_rank + dstate, padded(dt_rank + dstate), (seqlen + stride - 1) // stride
    for b in range(first, last):
        length, left_out = lengths[b], b * slots * kept
        if length < 1 or length > seqlen:
            fill(y, b * dim, (b + 1) * dim, np.nan)
            fill(low_rank, left_out, min(left_out + slots * kept, low_rank.size), 0)
            continue
        if filtered:
            expand_row(p, b * products.kept * dim, products, 0, bins, row, 0)
        source = row if filtered else p
        newest = ((0 if filtered else b * seqlen) + length - 1) * dim
        steps = (length + stride - 1) // stride
        start_scan(scan, 0, wide, dstate)
        for k in range(0, steps, ROWS):
            if not forget(scan, w, 0, wide, dstate):
                break
            rows = min(ROWS, steps - k)
            read(source, newest - k * stride * dim, stride * dim, rows, dim, u)
            silu(u, rows * wide)
            scan_block(u, rows, k == 0, w, transposed, scan, dim, dstate, dt_rank)
            if low_rank.size > 0:
                for i in range(rows):
                    for j in range(kept):
                        put(low_rank, left_out, at(scan.projected, i * columns + j))
                        left_out += 1
        fill(low_rank, left_out, min((b + 1) * slots * kept, low_rank.size), 0)
        scanned(scan, 0, wide, value, 0)
        fill(gate, 0, wide, 1)
        if has_z:
            for e in range(dim):
                put(gate, e, at(z, b * dim + at(order, e)))
            silu(gate, wide)
        for e in range(dim):
            put(y, b * dim + at(order, e), at(gate, e) * at(value, e))
