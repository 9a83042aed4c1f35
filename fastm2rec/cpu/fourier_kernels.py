"""A causal convolution of u [L, E], seen in the low frequencies: from U = V^T u and u's last positions to V^T conv(u).

V is a Fourier basis over all L slots: columns 1, cos, sin, cos, sin, ... With theta_k = 2 pi k / L and taps w_j, a
circular convolution turns each pair and scales it, and what a causal one does not carry over from the end to the start
is taken off again:

    H_k = sum_j w_j cos(j theta_k)         G_k = sum_j w_j sin(j theta_k)
    cos:  H U_cos - G U_sin                sin:  G U_cos + H U_sin                  each less sum_i V_i e_i
    e_i = sum_{j > i} w_j u[L - j + i]     for the width - 1 first positions i

So the convolution costs a few operations for each bin, and no pass over [L, E]. A bias adds itself times V^T 1. The
gradients are those of this bilinear form; those of the taps are left per group of GROUP rows, as the gradients of H, G
and the e_i's products.

H, G [frequencies, dim] and the taps [width, dim], w_0 first, are one array, `response`.

Arrays are flat and contiguous, [rows, columns + width - 1, dim] with u's last positions behind the bins; dim is a
multiple of LANES.
"""

from __future__ import annotations

from numba.extending import register_jitable

from .compiler import inline, part
from .parts import fill
from .simd import LANES, at, full, load, store
from .slices import sliced

GROUP = 8


@inline
def _add(x, place, value):
    store(x, place, load(x, place) + value)


@part
def _edges(x, start, response, taps, width, dim, c, edges):
    """e_i of one tile of channels to edges [width - 1, LANES]; `start` is where the last positions of x begin."""
    for i in range(width - 1):
        value = full(x, 0.0)
        for j in range(i + 1, width):
            value = value + load(response, taps + j * dim + c) * load(x, start + (width - 1 - j + i) * dim + c)
        store(edges, i * LANES, value)


@part
def convolve_row(x, start, response, bias, offsets, basis, out, to, columns, width, dim, edges):
    """out[to:] [columns, dim] of one row from x[start:]; `bias` and `offsets`, V^T 1, or neither."""
    extra, G, taps = width - 1, (columns // 2 + 1) * dim, 2 * (columns // 2 + 1) * dim
    for c in range(0, dim, LANES):
        _edges(x, start + columns * dim, response, taps, width, dim, c, edges)
        for r in range(columns):
            place = (r + 1) // 2 * dim + c
            h, g = load(response, place), load(response, G + place)
            own = load(x, start + r * dim + c)
            if r == 0 or (r % 2 and r + 1 == columns):  # a frequency without a sine
                value = h * own
            elif r % 2:
                value = h * own - g * load(x, start + (r + 1) * dim + c)
            else:
                value = h * own + g * load(x, start + (r - 1) * dim + c)
            for i in range(extra):
                value = value - at(basis, i * columns + r) * load(edges, i * LANES)
            if bias.size:
                value = value + at(offsets, r) * load(bias, c)
            store(out, to + r * dim + c, value)


@part
def convolve_row_backward(
    x, start, dout, to, response, offsets, basis, dx, sums, into, columns, width, dim, edges
):  # fmt: skip
    """dx[start:] of one row; the gradients of `response` and of the bias are added to sums[into:], as in `backward`."""
    extra, frequencies = width - 1, columns // 2 + 1
    G, taps, bias = frequencies * dim, 2 * frequencies * dim, (2 * frequencies + width) * dim
    tail = start + columns * dim
    for c in range(0, dim, LANES):
        for i in range(extra):
            store(edges, i * LANES, full(x, 0.0))
        offset = full(x, 0.0)
        for r in range(columns):
            place = (r + 1) // 2 * dim + c
            h, g = load(response, place), load(response, G + place)
            d, own = load(dout, to + r * dim + c), load(x, start + r * dim + c)
            _add(sums, into + place, d * own)
            value = h * d
            if r > 0 and not (r % 2 and r + 1 == columns):
                if r % 2:
                    _add(sums, into + G + place, 0.0 - d * load(x, start + (r + 1) * dim + c))
                    value = value + g * load(dout, to + (r + 1) * dim + c)
                else:
                    _add(sums, into + G + place, d * load(x, start + (r - 1) * dim + c))
                    value = value - g * load(dout, to + (r - 1) * dim + c)
            store(dx, start + r * dim + c, value)
            for i in range(extra):
                store(edges, i * LANES, load(edges, i * LANES) - at(basis, i * columns + r) * d)
            if offsets.size:
                offset = offset + at(offsets, r) * d
        if offsets.size:
            _add(sums, into + bias + c, offset)
        for t in range(extra):
            value = full(x, 0.0)
            for i in range(t + 1):  # t = width - 1 - j + i
                j = width - 1 - t + i
                edge = load(edges, i * LANES)
                value = value + load(response, taps + j * dim + c) * edge
                _add(sums, into + taps + j * dim + c, load(x, tail + t * dim + c) * edge)
            store(dx, tail + t * dim + c, value)


@register_jitable
def sums_size(columns, width, dim, has_bias):
    """Elements of a group's sums."""
    return (2 * (columns // 2 + 1) + width + has_bias) * dim


@sliced
def forward(first, last, scratch, x, response, none, basis, out, columns, width, dim):
    """out [rows, columns, dim] of the rows from `first` to before `last`, without a bias; `none` is empty."""
    size = (columns + width - 1) * dim
    for b in range(first, last):
        convolve_row(x, b * size, response, none, none, basis, out, b * columns * dim, columns, width, dim, scratch)


@sliced
def backward(first, last, scratch, x, dout, response, none, basis, dx, sums, batch, columns, width, dim):
    """dx, and of each group the gradient of `response`, of the taps that which the edges have, to sums [groups,
    2 frequencies + width, dim]."""
    size, every = (columns + width - 1) * dim, sums_size(columns, width, dim, 0)
    for group in range(first, last):
        fill(sums, group * every, (group + 1) * every, 0)
        for b in range(group * GROUP, min(batch, (group + 1) * GROUP)):
            convolve_row_backward(
                x, b * size, dout, b * columns * dim, response, none, basis, dx, sums, group * every, columns, width,
                dim, scratch,
            )  # fmt: skip
