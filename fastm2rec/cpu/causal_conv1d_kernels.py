"""The causal convolution of rows [L, E], with or without SiLU, and its gradient: one pass each.

    p_t = bias + sum_j w_j x_{t - J + 1 + j}      y_t = p_t or silu(p_t)
    g_t = dy_t or dy_t silu'(p_t)                 dx_t = sum_j w_j g_{t + J - 1 - j}
    dw_j = sum_t g_t x_{t - J + 1 + j}            dbias = sum_t g_t

p is made again for the gradient. Arrays are flat and contiguous: x, y [rows, seqlen, dim], taps [J, dim]; dim is a
multiple of LANES.
"""

from __future__ import annotations

from .compiler import inline
from .elementary import sigmoid
from .parts import fill
from .simd import LANES, full, load, store
from .slices import sliced

GROUP = 8  # rows of the batch whose gradients of the taps are one sum
RUN = 32  # positions that are summed for themselves: a sum over all of a long row would lose digits


@inline
def _convolved(x, start, t, taps, bias, width, dim, c):
    """p_t of a tile of channels of the row at `start`."""
    value = full(x, 0.0)
    for j in range(max(0, width - 1 - t), width):
        value = value + load(taps, j * dim + c) * load(x, start + (t - width + 1 + j) * dim + c)
    return value + load(bias, c)


@sliced
def forward(first, last, scratch, x, taps, bias, y, seqlen, width, dim, has_silu):
    """y of the rows from `first` to before `last`."""
    for b in range(first, last):
        start = b * seqlen * dim
        for t in range(seqlen):
            for c in range(0, dim, LANES):
                value = _convolved(x, start, t, taps, bias, width, dim, c)
                if has_silu:
                    value = value * sigmoid(value)
                store(y, start + t * dim + c, value)


def backward_scratch(seqlen, width):
    """Elements that `backward` needs."""
    return (seqlen + width + 1) * LANES


@sliced
def backward(first, last, scratch, x, dy, taps, bias, dx, sums, batch, seqlen, width, dim, has_silu):
    """dx of the groups from `first` to before `last`, and their sums [groups, J + 1, dim]: dw, and dbias behind it."""
    g, run = scratch[: seqlen * LANES], scratch[seqlen * LANES :]
    for group in range(first, last):
        own = group * (width + 1) * dim
        fill(sums, own, own + (width + 1) * dim, 0)
        for b in range(group * GROUP, min(batch, (group + 1) * GROUP)):
            start = b * seqlen * dim
            for c in range(0, dim, LANES):
                for begin in range(0, seqlen, RUN):
                    fill(run, 0, (width + 1) * LANES, 0)
                    for t in range(begin, min(seqlen, begin + RUN)):
                        value = load(dy, start + t * dim + c)
                        if has_silu:
                            p = _convolved(x, start, t, taps, bias, width, dim, c)
                            s = sigmoid(p)
                            value = value * (s * (1.0 + p * (1.0 - s)))
                        store(g, t * LANES, value)
                        for j in range(max(0, width - 1 - t), width):
                            product = value * load(x, start + (t - width + 1 + j) * dim + c)
                            store(run, j * LANES, load(run, j * LANES) + product)
                        store(run, width * LANES, load(run, width * LANES) + value)
                    for j in range(width + 1):
                        place = own + j * dim + c
                        store(sums, place, load(sums, place) + load(run, j * LANES))
                for t in range(seqlen):
                    value = full(x, 0.0)
                    for j in range(max(0, t + width - seqlen), width):
                        value = value + load(taps, j * dim + c) * load(g, (t + width - 1 - j) * LANES)
                    store(dx, start + t * dim + c, value)
