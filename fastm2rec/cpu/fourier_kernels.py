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


@sliced
def forward(first, last, scratch, x, response, bias, offsets, basis, out, columns, width, dim):
    """out [rows, columns, dim] of the rows from `first` to before `last`; `bias` and `offsets`, V^T 1, or neither."""
    extra, H, G, taps = width - 1, 0, (columns // 2 + 1) * dim, 2 * (columns // 2 + 1) * dim
    for b in range(first, last):
        start, to = b * (columns + extra) * dim, b * columns * dim
        for c in range(0, dim, LANES):
            _edges(x, start + columns * dim, response, taps, width, dim, c, scratch)
            for r in range(columns):
                k = (r + 1) // 2
                h, g = load(response, H + k * dim + c), load(response, G + k * dim + c)
                own = load(x, start + r * dim + c)
                if r == 0 or (r % 2 and r + 1 == columns):  # a frequency without a sine
                    value = h * own
                elif r % 2:
                    value = h * own - g * load(x, start + (r + 1) * dim + c)
                else:
                    value = h * own + g * load(x, start + (r - 1) * dim + c)
                for i in range(extra):
                    value = value - at(basis, i * columns + r) * load(scratch, i * LANES)
                if bias.size:
                    value = value + at(offsets, r) * load(bias, c)
                store(out, to + r * dim + c, value)


@sliced
def backward(first, last, scratch, x, dout, response, offsets, basis, dx, sums, batch, columns, width, dim):
    """dx, and of each group the gradients of `response` (of the taps that which the edges have) and then of the bias,
    where there are `offsets`: sums [groups, 2 frequencies + width (+ 1), dim]."""
    extra, frequencies = width - 1, columns // 2 + 1
    G, taps, bias = frequencies * dim, 2 * frequencies * dim, (2 * frequencies + width) * dim
    every = bias + dim if offsets.size else bias
    for group in range(first, last):
        into = group * every
        fill(sums, into, into + every, 0)
        for b in range(group * GROUP, min(batch, (group + 1) * GROUP)):
            start, to = b * (columns + extra) * dim, b * columns * dim
            tail = start + columns * dim
            for c in range(0, dim, LANES):
                for i in range(extra):
                    store(scratch, i * LANES, full(x, 0.0))
                offset = full(x, 0.0)
                for r in range(columns):
                    k = (r + 1) // 2
                    place = k * dim + c
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
                        store(scratch, i * LANES, load(scratch, i * LANES) - at(basis, i * columns + r) * d)
                    if offsets.size:
                        offset = offset + at(offsets, r) * d
                if offsets.size:
                    _add(sums, into + bias + c, offset)
                for t in range(extra):
                    value = full(x, 0.0)
                    for i in range(t + 1):  # t = width - 1 - j + i
                        j = width - 1 - t + i
                        edge = load(scratch, i * LANES)
                        value = value + load(response, taps + j * dim + c) * edge
                        _add(sums, into + taps + j * dim + c, load(x, tail + t * dim + c) * edge)
                    store(dx, tail + t * dim + c, value)
