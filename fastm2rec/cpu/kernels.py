"""The last position's scan and its gradient, from the convolution's output on: one pass over each row.

    u = silu(p)      delta, B, C = x_proj(u)      dt = softplus(dt_proj(delta))      T_t = sum_{s > t} dt_s
    y = sum_t dt_t u_t sum_n C_n B_tn exp(A_n T_t) + D u_last, then y * silu(z)

C and u_last are those of the row's last position; t runs over every stride-th position, counted back from it.

Forward: eight positions at a time, backward in time, so that T is known; all that is made of p for them stays in the
first-level cache. Within them a tile of channels is in registers, with its T and y.

Backward, with X = exp(A T), s the gradient of y before the gate, and g = s dt u:

    dC_n = sum g B X      dB_n = C_n sum_e g X      dA_n = sum_t g T C_n B X
    h = s sum_n C_n B X      dT = g sum_n C_n B A X      ddt_t = h u_t + sum_{r < t} dT_r
    du = h dt + what comes back through x_proj, C and D

goes the same way once, recomputing everything, and keeps four numbers for each channel and position; then forward in
time, where the sum of the dT is known. The gradients of the parameters are summed over groups of GROUP rows, and those
sums in order: they do not depend on how the groups are spread over threads.

Sums over time and over rows are compensated (Kahan): without that 1600 positions lose 2e-6.

All arrays are flat and contiguous. Scratch and parameters have their channels padded to whole Lanes, with zeros.
numba's cache on disk looks at this file alone: after a change in `simd.py`, touch it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.extending import register_jitable

from .simd import LANES, LOG2_E, at, exp2, full, load, sigmoid, softplus, store, total

ROWS = 8  # positions at a time
GROUP = 8  # rows of the batch whose parameter gradients are summed together
LN_2 = 1 / LOG2_E

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def _entry(function):
    """Compile, and keep the result on disk where there is a place for it."""
    try:
        return njit(function, cache=True, **_OPTIONS)
    except RuntimeError:  # a read-only installation without a home
        return njit(function, **_OPTIONS)


_part = njit(**_OPTIONS)
_inline = njit(forceinline=True, **_OPTIONS)


@register_jitable
def padded(n):
    """n rounded up to whole Lanes."""
    return (n + LANES - 1) // LANES * LANES


class Weights(NamedTuple):
    """The parameters, or their gradients, as the kernels read them; E = padded(dim)."""

    x_proj: np.ndarray  # [dt_rank + 2 dstate, E]: rows of delta, B, C
    dt_proj: np.ndarray  # [dt_rank, E]
    bias: np.ndarray  # [E]
    D: np.ndarray  # [E]
    A: np.ndarray  # [E / LANES, dstate, LANES]; of the parameters, A log2(e)


@register_jitable
def weights_size(dim, dstate, dt_rank):
    """Elements of `Weights`."""
    return (2 * dt_rank + 3 * dstate + 2) * padded(dim)


@register_jitable
def transposed_size(dim, dstate, dt_rank):
    """Elements of x_proj transposed: [dim, padded(dt_rank + dstate)] for delta and B, [dim, padded(dstate)] for C."""
    return dim * (padded(dt_rank + dstate) + padded(dstate))


@register_jitable
def forward_scratch(dim, dstate, dt_rank):
    """Elements that `forward` needs."""
    return (2 * ROWS + 5) * padded(dim) + ROWS * (padded(dt_rank + dstate) + dstate) + padded(dstate)


@register_jitable
def backward_scratch(seqlen, dim, dstate, dt_rank, stride):
    """Elements that `backward` needs."""
    steps = (seqlen + stride - 1) // stride
    return (
        weights_size(dim, dstate, dt_rank)
        + (3 * ROWS + 8 + 4 * steps) * padded(dim)
        + (ROWS + steps) * padded(dt_rank + dstate)
        + 3 * padded(dstate)
        + ROWS * dstate * (LANES + 1)
        + dstate * LANES
    )


@_part
def _fill(x, start, stop, value):
    # Like every copy here a loop: a slice that is assigned to takes numba two seconds to compile.
    for i in range(start, stop):
        x[i] = value


@_part
def _weights(flat, dim, dstate, dt_rank):
    wide = padded(dim)
    x_proj = (dt_rank + 2 * dstate) * wide
    dt_proj = x_proj + dt_rank * wide
    bias, D = dt_proj + wide, dt_proj + 2 * wide
    return Weights(flat[:x_proj], flat[x_proj:dt_proj], flat[dt_proj:bias], flat[bias:D], flat[D : D + dstate * wide])


@_entry
def pack(x_proj_weight, dt_proj_weight, bias, A, D, weights, transposed, dim, dstate, dt_rank):
    """Fill `weights` and `transposed` from the parameters in their usual layouts; `bias` may be empty."""
    wide = padded(dim)
    w = _weights(weights, dim, dstate, dt_rank)
    _fill(weights, 0, weights.size, 0)
    _fill(transposed, 0, transposed.size, 0)
    first = padded(dt_rank + dstate)
    second = padded(dstate)
    for j in range(dt_rank + 2 * dstate):
        if j < dt_rank + dstate:
            start, step = j, first
        else:
            start, step = dim * first + j - dt_rank - dstate, second
        for e in range(dim):
            w.x_proj[j * wide + e] = transposed[start + e * step] = x_proj_weight[j * dim + e]
    for e in range(dim):
        for r in range(dt_rank):
            w.dt_proj[r * wide + e] = dt_proj_weight[e * dt_rank + r]
        tile, lane = e // LANES, e % LANES
        for n in range(dstate):
            w.A[(tile * dstate + n) * LANES + lane] = A[e * dstate + n] * LOG2_E
        w.D[e] = D[e]
    for e in range(bias.size):
        w.bias[e] = bias[e]


@_inline
def _added(value, sum_, lost):
    """sum_ + value, and what the rounding lost (Kahan)."""
    value = value - lost
    new = sum_ + value
    return new, (new - sum_) - value


@_inline
def _accumulate(sums, lost, place, value):
    new, error = _added(value, load(sums, place), load(lost, place))
    store(sums, place, new)
    store(lost, place, error)


@_inline
def _quad(x, place):
    return load(x, place), load(x, place + LANES), load(x, place + 2 * LANES), load(x, place + 3 * LANES)


@_inline
def _store_quad(x, place, a, b, c, d):
    store(x, place, a)
    store(x, place + LANES, b)
    store(x, place + 2 * LANES, c)
    store(x, place + 3 * LANES, d)


@_part
def _read(x, start, step, rows, dim, out):
    """Rows of x, the first at `start` and each `step` before the last one, to out [rows, E]."""
    wide = padded(dim)
    for i in range(rows):
        base = start - i * step
        for e in range(dim):
            out[i * wide + e] = x[base + e]
        for e in range(dim, wide):
            out[i * wide + e] = 0


@_part
def _silu(x, size):
    for c in range(0, size, LANES):
        v = load(x, c)
        store(x, c, v * sigmoid(v))


@_part
def _project(x, weight, dim, columns, out):
    """out [ROWS, columns] = x [ROWS, E] times weight [dim, columns]."""
    wide = padded(dim)
    for j in range(0, columns, LANES):
        a = b = c = d = e = f = g = h = full(out, 0.0)
        for k in range(dim):
            w = load(weight, k * columns + j)
            a = a + at(x, k) * w
            b = b + at(x, wide + k) * w
            c = c + at(x, 2 * wide + k) * w
            d = d + at(x, 3 * wide + k) * w
            e = e + at(x, 4 * wide + k) * w
            f = f + at(x, 5 * wide + k) * w
            g = g + at(x, 6 * wide + k) * w
            h = h + at(x, 7 * wide + k) * w
        store(out, j, a)
        store(out, columns + j, b)
        store(out, 2 * columns + j, c)
        store(out, 3 * columns + j, d)
        store(out, 4 * columns + j, e)
        store(out, 5 * columns + j, f)
        store(out, 6 * columns + j, g)
        store(out, 7 * columns + j, h)


@_part
def _project_one(x, weight, dim, columns, out):
    """out [columns] = x [dim] times weight [dim, columns]."""
    for j in range(0, columns, LANES):
        even = odd = full(out, 0.0)
        for k in range(0, dim - 1, 2):
            even = even + at(x, k) * load(weight, k * columns + j)
            odd = odd + at(x, k + 1) * load(weight, (k + 1) * columns + j)
        if dim % 2:
            even = even + at(x, dim - 1) * load(weight, (dim - 1) * columns + j)
        store(out, j, even + odd)


@_part
def _steps(low_rank, columns, w, rows, dim, dt_rank, out):
    """out [rows, E], the step sizes before softplus, from the first dt_rank columns of low_rank."""
    wide = padded(dim)
    for i in range(rows):
        for c in range(0, wide, LANES):
            step = load(w.bias, c)
            for r in range(dt_rank):
                step = step + at(low_rank, i * columns + r) * load(w.dt_proj, r * wide + c)
            store(out, i * wide + c, step)


@_entry
def forward(
    p, lengths, z, y, weights, transposed, scratch, first, last, seqlen, dim, dstate, dt_rank, stride, has_z
):  # fmt: skip
    """y of the rows from `first` to before `last`; NaN where a length is not in 1..seqlen."""
    wide = padded(dim)
    columns, states = padded(dt_rank + dstate), padded(dstate)
    w = _weights(weights, dim, dstate, dt_rank)
    transposed_C = transposed[dim * columns :]
    u, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    raw, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    carried, scratch = scratch[: 4 * wide], scratch[4 * wide :]  # of each tile: T, y, and what both lost
    gate, scratch = scratch[:wide], scratch[wide:]
    projected, scratch = scratch[: ROWS * columns], scratch[ROWS * columns :]
    C, CB = scratch[:states], scratch[states:]
    for b in range(first, last):
        length = lengths[b]
        if length < 1 or length > seqlen:
            _fill(y, b * dim, (b + 1) * dim, np.nan)
            continue
        newest = (b * seqlen + length - 1) * dim
        steps = (length + stride - 1) // stride
        _fill(carried, 0, 4 * wide, 0)
        for k in range(0, steps, ROWS):
            rows = min(ROWS, steps - k)
            _read(p, newest - k * stride * dim, stride * dim, rows, dim, u)
            _silu(u, rows * wide)
            _project(u, transposed, dim, columns, projected)
            if k == 0:
                _project_one(u, transposed_C, dim, states, C)
                for c in range(0, wide, LANES):
                    store(carried, 4 * c + LANES, load(w.D, c) * load(u, c))
            _steps(projected, columns, w, rows, dim, dt_rank, raw)
            for i in range(rows):
                for n in range(dstate):
                    CB[i * dstate + n] = C[n] * projected[i * columns + dt_rank + n]
            for c in range(0, wide, LANES):
                T, value, lost_T, lost = _quad(carried, 4 * c)
                for i in range(rows):
                    kernel = full(scratch, 0.0)
                    for n in range(dstate):
                        X = exp2(load(w.A, c * dstate + n * LANES) * T)
                        kernel = kernel + at(CB, i * dstate + n) * X
                    dt, _ = softplus(load(raw, i * wide + c))
                    value, lost = _added(dt * load(u, i * wide + c) * kernel, value, lost)
                    T, lost_T = _added(dt, T, lost_T)
                _store_quad(carried, 4 * c, T, value, lost_T, lost)
        if has_z:
            _read(z, b * dim, 0, 1, dim, gate)
            _silu(gate, wide)
        else:
            _fill(gate, 0, wide, 1)
        for e in range(dim):
            y[b * dim + e] = gate[e] * carried[e // LANES * 4 * LANES + LANES + e % LANES]


@_entry
def backward(
    p, lengths, z, dy, dp, dz, sums, weights, transposed, scratch,
    first, last, batch, seqlen, dim, dstate, dt_rank, stride, has_z,
):  # fmt: skip
    """dp, dz and, in `sums` [groups, weights_size], the parameters' gradients, of the groups `first` to before `last`.

    All NaN for a row whose length is not in 1..seqlen.
    """
    size = weights_size(dim, dstate, dt_rank)
    w = _weights(weights, dim, dstate, dt_rank)
    errors, scratch = scratch[:size], scratch[size:]
    lost_by = _weights(errors, dim, dstate, dt_rank)
    wide = padded(dim)
    columns, states = padded(dt_rank + dstate), padded(dstate)
    transposed_C = transposed[dim * columns :]
    most = (seqlen + stride - 1) // stride
    u, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    raw, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    d_raw, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    carried, scratch = scratch[: 4 * wide], scratch[4 * wide :]  # as in `forward`; then the sum of dT
    s, scratch = scratch[: 4 * wide], scratch[4 * wide :]  # the gradient of y before the gate; z, dy, dz
    # Of each position's tiles: du, ddt, dT and the slope of softplus.
    kept, scratch = scratch[: 4 * most * wide], scratch[4 * most * wide :]
    projected, scratch = scratch[: (ROWS + most) * columns], scratch[(ROWS + most) * columns :]  # then its gradient
    C, scratch = scratch[:states], scratch[states:]
    dC, scratch = scratch[: 2 * states], scratch[2 * states :]
    gX, scratch = scratch[: ROWS * dstate * LANES], scratch[ROWS * dstate * LANES :]
    dA, CB = scratch[: dstate * LANES], scratch[dstate * LANES :]

    for b in range(first * GROUP, min(batch, last * GROUP)):
        gradient = sums[b // GROUP * size : (b // GROUP + 1) * size]
        into = _weights(gradient, dim, dstate, dt_rank)
        if b % GROUP == 0:
            _fill(gradient, 0, size, 0)
            _fill(errors, 0, size, 0)
        length = lengths[b]
        if length < 1 or length > seqlen:
            _fill(dp, b * seqlen * dim, (b + 1) * seqlen * dim, np.nan)
            _fill(dz, b * dim, (b + 1) * dim if has_z else b * dim, np.nan)
            continue
        newest = (b * seqlen + length - 1) * dim
        steps = (length + stride - 1) // stride
        _read(dy, b * dim, 0, 1, dim, s)
        if has_z:
            _read(z, b * dim, 0, 1, dim, s[wide:])
            for c in range(0, wide, LANES):
                gate = load(s, wide + c)
                store(s, 2 * wide + c, load(s, c))
                store(s, c, load(s, c) * gate * sigmoid(gate))
        _fill(carried, 0, 4 * wide, 0)
        _fill(dC, 0, 2 * states, 0)

        for k in range(0, steps, ROWS):
            rows = min(ROWS, steps - k)
            low_rank = projected[k * columns :]
            _read(p, newest - k * stride * dim, stride * dim, rows, dim, u)
            _silu(u, rows * wide)
            _project(u, transposed, dim, columns, low_rank)
            if k == 0:
                _project_one(u, transposed_C, dim, states, C)
                for c in range(0, wide, LANES):
                    store(carried, 4 * c + LANES, load(w.D, c) * load(u, c))
                    _accumulate(into.D, lost_by.D, c, load(s, c) * load(u, c))
            _steps(low_rank, columns, w, rows, dim, dt_rank, raw)
            for i in range(rows):
                for n in range(dstate):
                    CB[i * dstate + n] = C[n] * low_rank[i * columns + dt_rank + n]
            _fill(gX, 0, ROWS * dstate * LANES, 0)
            for c in range(0, wide, LANES):
                T, value, lost_T, lost = _quad(carried, 4 * c)
                ds = load(s, c)
                _fill(dA, 0, dstate * LANES, 0)
                for i in range(rows):
                    dt, slope = softplus(load(raw, i * wide + c))
                    x = load(u, i * wide + c)
                    g = ds * dt * x
                    gT = g * T
                    kernel = rate = full(scratch, 0.0)
                    for n in range(dstate):
                        A = load(w.A, c * dstate + n * LANES)
                        X = exp2(A * T)
                        store(gX, (i * dstate + n) * LANES, load(gX, (i * dstate + n) * LANES) + g * X)
                        X = at(CB, i * dstate + n) * X
                        kernel = kernel + X
                        rate = rate + A * X
                        store(dA, n * LANES, load(dA, n * LANES) + gT * X)
                    h = ds * kernel
                    _store_quad(kept, 4 * ((k + i) * wide + c), h * dt, h * x, g * rate * LN_2, slope)
                    value, lost = _added(dt * x * kernel, value, lost)
                    T, lost_T = _added(dt, T, lost_T)
                for n in range(dstate):
                    _accumulate(into.A, lost_by.A, c * dstate + n * LANES, load(dA, n * LANES))
                _store_quad(carried, 4 * c, T, value, lost_T, lost)
            for i in range(rows):
                for n in range(dstate):
                    place = i * columns + dt_rank + n
                    sum_gX = total(load(gX, (i * dstate + n) * LANES))
                    dC[n], dC[states + n] = _added(low_rank[place] * sum_gX, dC[n], dC[states + n])
                    low_rank[place] = C[n] * sum_gX

        if has_z:
            for c in range(0, wide, LANES):
                gate = load(s, wide + c)
                open_ = sigmoid(gate)
                slope_z = open_ * (1.0 + gate * (1.0 - open_))
                store(s, 3 * wide + c, load(s, 2 * wide + c) * load(carried, 4 * c + LANES) * slope_z)
            for e in range(dim):
                dz[b * dim + e] = s[3 * wide + e]
        for t in range(seqlen):
            if t >= length or (length - 1 - t) % stride:
                _fill(dp, (b * seqlen + t) * dim, (b * seqlen + t + 1) * dim, 0)

        _fill(carried, 0, 2 * wide, 0)
        for k in range((steps - 1) // ROWS * ROWS, -1, -ROWS):
            rows = min(ROWS, steps - k)
            low_rank = projected[k * columns :]
            for c in range(0, wide, LANES):
                sum_dT, lost = load(carried, c), load(carried, wide + c)
                bias = full(scratch, 0.0)
                for i in range(rows - 1, -1, -1):
                    _, ddt, dT, slope = _quad(kept, 4 * ((k + i) * wide + c))
                    gradient = (ddt + sum_dT) * slope
                    store(d_raw, i * wide + c, gradient)
                    bias = bias + gradient
                    sum_dT, lost = _added(dT, sum_dT, lost)
                _accumulate(into.bias, lost_by.bias, c, bias)
                store(carried, c, sum_dT)
                store(carried, wide + c, lost)
            for r in range(dt_rank):
                for c in range(0, wide, LANES):
                    gradient = full(scratch, 0.0)
                    for i in range(rows):
                        gradient = gradient + at(low_rank, i * columns + r) * load(d_raw, i * wide + c)
                    _accumulate(into.dt_proj, lost_by.dt_proj, r * wide + c, gradient)
                for i in range(rows):
                    gradient = full(scratch, 0.0)
                    for c in range(0, wide, LANES):
                        gradient = gradient + load(d_raw, i * wide + c) * load(w.dt_proj, r * wide + c)
                    low_rank[i * columns + r] = total(gradient)
            # p again, for u and for silu's derivative, which takes the place of the step sizes.
            _read(p, newest - k * stride * dim, stride * dim, rows, dim, u)
            for c in range(0, rows * wide, LANES):
                x = load(u, c)
                open_ = sigmoid(x)
                store(u, c, x * open_)
                store(raw, c, open_ * (1.0 + x * (1.0 - open_)))
            if k == 0:
                for c in range(0, wide, LANES):
                    gradient = load(kept, 4 * c) + load(w.D, c) * load(s, c)
                    for n in range(dstate):
                        row = (dt_rank + dstate + n) * wide + c
                        gradient = gradient + at(dC, n) * load(w.x_proj, row)
                        _accumulate(into.x_proj, lost_by.x_proj, row, at(dC, n) * load(u, c))
                    store(kept, 4 * c, gradient)
            for i in range(rows):
                for c in range(0, wide, LANES):
                    gradient = load(kept, 4 * ((k + i) * wide + c))
                    for j in range(dt_rank + dstate):
                        gradient = gradient + at(low_rank, i * columns + j) * load(w.x_proj, j * wide + c)
                    store(raw, i * wide + c, gradient * load(raw, i * wide + c))
                place = newest - (k + i) * stride * dim
                for e in range(dim):
                    dp[place + e] = raw[i * wide + e]
            for j in range(dt_rank + dstate):
                for c in range(0, wide, LANES):
                    gradient = full(scratch, 0.0)
                    for i in range(rows):
                        gradient = gradient + at(low_rank, i * columns + j) * load(u, i * wide + c)
                    _accumulate(into.x_proj, lost_by.x_proj, j * wide + c, gradient)


@_entry
def combine(sums, scratch, d_x_proj, d_dt_proj, d_bias, dA, dD, dim, dstate, dt_rank):
    """Add up the groups' gradients, in order, and write them in the parameters' usual layouts."""
    wide = padded(dim)
    size = weights_size(dim, dstate, dt_rank)
    result, lost = scratch[:size], scratch[size:]
    _fill(result, 0, size, 0)
    _fill(lost, 0, size, 0)
    for start in range(0, sums.size, size):
        for c in range(0, size, LANES):
            _accumulate(result, lost, c, load(sums, start + c))
    w = _weights(result, dim, dstate, dt_rank)
    for j in range(dt_rank + 2 * dstate):
        for e in range(dim):
            d_x_proj[j * dim + e] = w.x_proj[j * wide + e]
    for e in range(dim):
        for r in range(dt_rank):
            d_dt_proj[e * dt_rank + r] = w.dt_proj[r * wide + e]
        tile, lane = e // LANES, e % LANES
        for n in range(dstate):
            dA[e * dstate + n] = w.A[(tile * dstate + n) * LANES + lane]
        dD[e] = w.D[e]
    for e in range(d_bias.size):
        d_bias[e] = w.bias[e]
