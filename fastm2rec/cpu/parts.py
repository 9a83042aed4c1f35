"""What the engine's kernels share: the parameters as they read them, and small matrix products.

All arrays are flat and contiguous. Scratch and parameters have their channels padded to whole Lanes, with zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .compiler import entry, inline, part
from .elementary import LOG2_E, exp2, forgotten, sigmoid, softplus
from .simd import LANES, at, full, least, load, put, store

ROWS = 8  # positions at a time


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
    slowest: np.ndarray  # [E / LANES, dstate], in whole Lanes: the greatest A of a tile; of no use in gradients


@register_jitable
def weights_size(dim, dstate, dt_rank):
    """Elements of `Weights`."""
    wide = padded(dim)
    return (2 * dt_rank + 3 * dstate + 2) * wide + padded(wide // LANES * dstate)


@register_jitable
def transposed_size(dim, dstate, dt_rank):
    """Elements of x_proj transposed: [dim, padded(dt_rank + dstate)] for delta and B, [dim, padded(dstate)] for C."""
    return dim * (padded(dt_rank + dstate) + padded(dstate))


@part
def fill(x, start, stop, value):
    # Like every copy here it is spelled out: a slice that is assigned to takes numba two seconds to compile.
    whole = start + (stop - start) // LANES * LANES
    for i in range(start, whole, LANES):
        store(x, i, full(x, value))
    for i in range(max(start, whole), stop):
        x[i] = value


@part
def write(row, start, size, out, place):
    """row[start : start + size] to out[place:]."""
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        store(out, place + i, load(row, start + i))
    for i in range(whole, size):
        out[place + i] = row[start + i]


@part
def as_weights(flat, dim, dstate, dt_rank):
    wide = padded(dim)
    x_proj = (dt_rank + 2 * dstate) * wide
    dt_proj = x_proj + dt_rank * wide
    bias, D = dt_proj + wide, dt_proj + 2 * wide
    A = D + dstate * wide
    return Weights(flat[:x_proj], flat[x_proj:dt_proj], flat[dt_proj:bias], flat[bias:D], flat[D:A], flat[A:])


@entry
def pack(x_proj_weight, dt_proj_weight, bias, A, D, order, weights, transposed, dim, dstate, dt_rank):
    """Fill `weights` and `transposed` from the parameters in their usual layouts; `bias` may be empty.

    Channel e of the kernels is channel order[e] of the parameters.
    """
    wide = padded(dim)
    w = as_weights(weights, dim, dstate, dt_rank)
    fill(weights, 0, weights.size, 0)
    fill(transposed, 0, transposed.size, 0)
    first = padded(dt_rank + dstate)
    second = padded(dstate)
    for j in range(dt_rank + 2 * dstate):
        if j < dt_rank + dstate:
            start, step = j, first
        else:
            start, step = dim * first + j - dt_rank - dstate, second
        for e in range(dim):
            w.x_proj[j * wide + e] = transposed[start + e * step] = x_proj_weight[j * dim + order[e]]
    for e in range(dim):
        for r in range(dt_rank):
            w.dt_proj[r * wide + e] = dt_proj_weight[order[e] * dt_rank + r]
        tile, lane = e // LANES, e % LANES
        for n in range(dstate):
            rate = A[order[e] * dstate + n] * LOG2_E
            w.A[(tile * dstate + n) * LANES + lane] = rate
            place = tile * dstate + n
            w.slowest[place] = rate if lane == 0 else max(w.slowest[place], rate)
        w.D[e] = D[order[e]]
    for e in range(bias.size):
        w.bias[e] = bias[order[e]]


@inline
def added(value, sum_, lost):
    """sum_ + value, and what the rounding lost (Kahan)."""
    value = value - lost
    new = sum_ + value
    return new, (new - sum_) - value


@inline
def accumulate(sums, lost, place, value):
    new, error = added(value, load(sums, place), load(lost, place))
    store(sums, place, new)
    store(lost, place, error)


@inline
def quad(x, place):
    return load(x, place), load(x, place + LANES), load(x, place + 2 * LANES), load(x, place + 3 * LANES)


@inline
def store_quad(x, place, a, b, c, d):
    store(x, place, a)
    store(x, place + LANES, b)
    store(x, place + 2 * LANES, c)
    store(x, place + 3 * LANES, d)


@part
def read(x, start, step, rows, dim, out):
    """Rows of x, the first at `start` and each `step` before the last one, to out [rows, E]."""
    wide = padded(dim)
    for i in range(rows):
        base = start - i * step
        if dim == wide:
            for e in range(0, dim, LANES):
                store(out, i * wide + e, load(x, base + e))
            continue
        for e in range(dim):
            out[i * wide + e] = x[base + e]
        for e in range(dim, wide):
            out[i * wide + e] = 0


@part
def silu(x, size):
    for c in range(0, size, LANES):
        v = load(x, c)
        store(x, c, v * sigmoid(v))


@part
def project(x, weight, dim, columns, out):
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


@part
def project_one(x, weight, dim, columns, out):
    """out [columns] = x [dim] times weight [dim, columns]."""
    for j in range(0, columns, LANES):
        even = odd = full(out, 0.0)
        for k in range(0, dim - 1, 2):
            even = even + at(x, k) * load(weight, k * columns + j)
            odd = odd + at(x, k + 1) * load(weight, (k + 1) * columns + j)
        if dim % 2:
            even = even + at(x, dim - 1) * load(weight, (dim - 1) * columns + j)
        store(out, j, even + odd)


@part
def step_sizes(low_rank, columns, w, rows, wide, from_, to, dt_rank, out):
    """out [rows, E], the step sizes before softplus, from the first dt_rank columns of low_rank.

    Here and below of the channels `from_` to `to`, whole tiles of them.
    """
    for i in range(rows):
        for c in range(from_, to, LANES):
            step = load(w.bias, c)
            for r in range(dt_rank):
                step = step + at(low_rank, i * columns + r) * load(w.dt_proj, r * wide + c)
            store(out, i * wide + c, step)


class Scan(NamedTuple):
    """What the scan of one row keeps between its blocks of ROWS positions."""

    raw: np.ndarray  # [ROWS, E], step sizes
    carried: np.ndarray  # [E / LANES, 4, LANES]: T, y, and what the sums of both lost
    projected: np.ndarray  # [ROWS, padded(dt_rank + dstate)]: delta and B
    C: np.ndarray  # [padded(dstate)]
    CB: np.ndarray  # [ROWS, dstate]
    times: np.ndarray  # [ROWS, LANES], of one tile: T; and, in the backward pass,
    gains: np.ndarray  # g
    kernels: np.ndarray  # sum_n C B X
    rates: np.ndarray  # sum_n C B A X
    states: np.ndarray  # int32 [E / LANES, 1 + dstate]: how many states of a tile still remember, and which


@register_jitable
def scan_size(dim, dstate, dt_rank):
    """Elements of `Scan`."""
    sums = (ROWS + 4) * padded(dim) + ROWS * (padded(dt_rank + dstate) + dstate + 4 * LANES) + padded(dstate)
    return sums + padded(dim) // LANES * (1 + dstate)


@part
def as_scan(flat, dim, dstate, dt_rank):
    wide = padded(dim)
    raw = ROWS * wide
    carried = raw + 4 * wide
    projected = carried + ROWS * padded(dt_rank + dstate)
    C = projected + padded(dstate)
    CB = C + ROWS * dstate
    rates = CB + 4 * ROWS * LANES
    return Scan(
        flat[:raw],
        flat[raw:carried],
        flat[carried:projected],
        flat[projected:C],
        flat[C:CB],
        flat[CB : CB + ROWS * LANES],
        flat[CB + ROWS * LANES : CB + 2 * ROWS * LANES],
        flat[CB + 2 * ROWS * LANES : CB + 3 * ROWS * LANES],
        flat[CB + 3 * ROWS * LANES : rates],
        flat[rates : rates + wide // LANES * (1 + dstate)].view(np.int32),
    )


@part
def start_scan(scan, from_, to, dstate):
    fill(scan.carried, 4 * from_, 4 * to, 0)
    for tile in range(from_ // LANES, to // LANES):
        put(scan.states, tile * (1 + dstate), dstate)
        for n in range(dstate):
            put(scan.states, tile * (1 + dstate) + 1 + n, n)


@part
def forget(scan, w, from_, to, dstate):
    """Strike out the states whose decay has come to nothing; are there others?

    T only grows: what is forgotten at one position stays so at all earlier ones.
    """
    left = 0
    for tile in range(from_ // LANES, to // LANES):
        T = least(load(scan.carried, 4 * tile * LANES))
        first = tile * (1 + dstate)
        count = 0
        for j in range(at(scan.states, first)):
            n = at(scan.states, first + 1 + j)
            if not forgotten(at(w.slowest, tile * dstate + n) * T):
                count += 1
                put(scan.states, first + count, n)
        put(scan.states, first, count)
        left += count
    return left > 0


@part
def scan_block(u, rows, first, w, transposed, scan, dim, dstate, dt_rank):
    """Take in the next `rows` positions, backward in time, u [ROWS, E] after SiLU; from the last one where `first`."""
    wide, columns = padded(dim), padded(dt_rank + dstate)
    fill(u, rows * wide, ROWS * wide, 0)
    project(u, transposed, dim, columns, scan.projected)
    if first:
        project_one(u, transposed[dim * columns :], dim, padded(dstate), scan.C)
    scan_channels(u, rows, first, w, scan.projected, scan.C, scan, wide, 0, wide, dstate, dt_rank)


@part
def scan_channels(u, rows, first, w, projected, C, scan, wide, from_, to, dstate, dt_rank):
    """The rest of that: from delta and B [ROWS, padded(dt_rank + dstate)] on."""
    columns = padded(dt_rank + dstate)
    if first:
        for c in range(from_, to, LANES):
            store(scan.carried, 4 * c + LANES, load(w.D, c) * load(u, c))
    step_sizes(projected, columns, w, rows, wide, from_, to, dt_rank, scan.raw)
    for i in range(rows):
        for c in range(i * wide + from_, i * wide + to, LANES):
            dt, _ = softplus(load(scan.raw, c))
            store(scan.raw, c, dt)
    for i in range(rows, ROWS):
        fill(scan.raw, i * wide + from_, i * wide + to, 0)  # no position, no time
    for i in range(ROWS):
        for n in range(dstate):
            put(scan.CB, i * dstate + n, at(C, n) * at(projected, i * columns + dt_rank + n))
    for c in range(from_, to, LANES):
        first_state = c // LANES * (1 + dstate) + 1
        count = at(scan.states, first_state - 1)
        if count > 0:
            _scan_tile(u, c, rows, wide, w.A, scan, first_state, count, dstate)


@part
def _scan_tile(u, c, rows, wide, A, scan, first_state, count, dstate):
    """`rows` positions of one tile of channels; what is behind them, up to ROWS, has neither time nor input."""
    T, value, lost_T, lost = quad(scan.carried, 4 * c)
    dt, times = scan.raw[c:], scan.times
    for i in range(ROWS):
        store(times, i * LANES, T)
        T, lost_T = added(load(dt, i * wide), T, lost_T)
    for i in range(0, rows, 2):
        t0, t1 = load(times, i * LANES), load(times, i * LANES + LANES)
        k0 = k1 = full(u, 0.0)
        for j in range(first_state, first_state + count):
            n = at(scan.states, j)
            rate = load(A, c * dstate + n * LANES)
            place = i * dstate + n
            k0 = k0 + at(scan.CB, place) * exp2(rate * t0)
            k1 = k1 + at(scan.CB, place + dstate) * exp2(rate * t1)
        place = i * wide
        value, lost = added(load(dt, place) * load(u, place + c) * k0, value, lost)
        value, lost = added(load(dt, place + wide) * load(u, place + wide + c) * k1, value, lost)
    store_quad(scan.carried, 4 * c, T, value, lost_T, lost)


@part
def scanned(scan, from_, to, out, start):
    """The scan's output [E] to out[start:]."""
    for c in range(from_, to, LANES):
        store(out, start + c, load(scan.carried, 4 * c + LANES))
