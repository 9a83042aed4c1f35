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

A state whose decay is below 2^-48 in all channels of a tile is struck out, for good: T only grows on the way back. When
none is left, earlier positions have neither weight nor gradient. How soon that comes depends on the step sizes: right
after the start most states are gone within a few positions, in trained models slow channels keep their tile alive.

Sums over time and over rows are compensated (Kahan): without that 1600 positions lose 2e-6.

Arrays are as `parts.py` says.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from .compiler import entry, part
from .parts import (
    ROWS,
    accumulate,
    added,
    as_scan,
    as_weights,
    fill,
    forget,
    padded,
    project,
    project_one,
    quad,
    read,
    remembered,
    scan_block,
    scan_size,
    scanned,
    silu,
    start_scan,
    step_sizes,
    store_quad,
    weights_size,
    write,
)  # fmt: skip
from .simd import LANES, LOG2_E, at, exp2, full, load, sigmoid, softplus, store, total

GROUP = 8  # rows of the batch whose parameter gradients are summed together
LN_2 = 1 / LOG2_E


@register_jitable
def forward_scratch(dim, dstate, dt_rank):
    """Elements that `forward` needs."""
    return (ROWS + 2) * padded(dim) + scan_size(dim, dstate, dt_rank)


@register_jitable
def backward_scratch(seqlen, dim, dstate, dt_rank, stride):
    """Elements that `backward` needs."""
    steps = ((seqlen + stride - 1) // stride + ROWS - 1) // ROWS * ROWS
    return (
        weights_size(dim, dstate, dt_rank)
        + scan_size(dim, dstate, dt_rank)
        + (2 * ROWS + 4 + 4 * steps) * padded(dim)
        + (ROWS + steps) * padded(dt_rank + dstate)
        + 2 * padded(dstate)
        + (ROWS + 1) * dstate * LANES
    )


@entry
def forward(
    p, lengths, z, y, weights, transposed, scratch, first, last, seqlen, dim, dstate, dt_rank, stride, has_z
):  # fmt: skip
    """y of the rows from `first` to before `last`; NaN where a length is not in 1..seqlen."""
    wide = padded(dim)
    w = as_weights(weights, dim, dstate, dt_rank)
    u, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    gate, scratch = scratch[:wide], scratch[wide:]
    value, scratch = scratch[:wide], scratch[wide:]
    scan = as_scan(scratch, dim, dstate, dt_rank)
    for b in range(first, last):
        length = lengths[b]
        if length < 1 or length > seqlen:
            fill(y, b * dim, (b + 1) * dim, np.nan)
            continue
        newest = (b * seqlen + length - 1) * dim
        steps = (length + stride - 1) // stride
        start_scan(scan, wide, dstate)
        for k in range(0, steps, ROWS):
            if not forget(scan, w.A, wide, dstate):
                break
            rows = min(ROWS, steps - k)
            read(p, newest - k * stride * dim, stride * dim, rows, dim, u)
            silu(u, rows * wide)
            scan_block(u, rows, k == 0, w, transposed, scan, dim, dstate, dt_rank)
        if has_z:
            read(z, b * dim, 0, 1, dim, gate)
            silu(gate, wide)
        else:
            fill(gate, 0, wide, 1)
        scanned(scan, wide, value, 0)
        for e in range(dim):
            y[b * dim + e] = gate[e] * value[e]


@part
def tile_gradients(u, c, rows, wide, A, scan, first_state, count, dstate, ds, kept, gX, into_A, lost_A):
    """`rows` positions of one tile of channels: y and T go on, and what the gradients need is kept, as above."""
    T, value, lost_T, lost = quad(scan.carried, 4 * c)
    times, gains = scan.times, scan.gains
    for i in range(rows):
        dt, slope = softplus(load(scan.raw, i * wide + c))
        x = load(u, i * wide + c)
        store(times, i * LANES, T)
        store(gains, i * LANES, ds * dt * x)
        store_quad(kept, 4 * i * wide, dt, x, slope, dt * x)
        T, lost_T = added(dt, T, lost_T)
    fill(times, rows * LANES, ROWS * LANES, 0)
    fill(gains, rows * LANES, ROWS * LANES, 0)
    for half in range(0, rows, 4):
        t0, t1, t2, t3 = quad(times, half * LANES)
        g0, g1, g2, g3 = quad(gains, half * LANES)
        k0 = k1 = k2 = k3 = r0 = r1 = r2 = r3 = full(u, 0.0)
        for j in range(first_state, first_state + count):
            n = scan.states[j]
            rate = load(A, c * dstate + n * LANES)
            place = (half * dstate + n) * LANES
            CB = half * dstate + n
            X = exp2(rate * t0)
            store(gX, place, load(gX, place) + g0 * X)
            X = at(scan.CB, CB) * X
            k0, r0, dA = k0 + X, r0 + rate * X, g0 * t0 * X
            X, place = exp2(rate * t1), place + dstate * LANES
            store(gX, place, load(gX, place) + g1 * X)
            X = at(scan.CB, CB + dstate) * X
            k1, r1, dA = k1 + X, r1 + rate * X, dA + g1 * t1 * X
            X, place = exp2(rate * t2), place + dstate * LANES
            store(gX, place, load(gX, place) + g2 * X)
            X = at(scan.CB, CB + 2 * dstate) * X
            k2, r2, dA = k2 + X, r2 + rate * X, dA + g2 * t2 * X
            X, place = exp2(rate * t3), place + dstate * LANES
            store(gX, place, load(gX, place) + g3 * X)
            X = at(scan.CB, CB + 3 * dstate) * X
            k3, r3, dA = k3 + X, r3 + rate * X, dA + g3 * t3 * X
            accumulate(into_A, lost_A, c * dstate + n * LANES, dA)
        store_quad(scan.kernels, half * LANES, k0, k1, k2, k3)
        store_quad(scan.rates, half * LANES, r0, r1, r2, r3)
    for i in range(rows):
        dt, x, slope, dtx = quad(kept, 4 * i * wide)
        kernel = load(scan.kernels, i * LANES)
        h = ds * kernel
        dT = load(gains, i * LANES) * load(scan.rates, i * LANES) * LN_2
        store_quad(kept, 4 * i * wide, h * dt, h * x, dT, slope)
        value, lost = added(dtx * kernel, value, lost)
    store_quad(scan.carried, 4 * c, T, value, lost_T, lost)


@part
def outer_products(low, columns, count, rows, x, wide, sums, lost):
    """sums [count, E] += low [ROWS, columns]^T x [ROWS, E], of the first `rows` rows and `count` columns."""
    whole = count // ROWS * ROWS
    for k in range(0, wide, LANES):
        for j in range(0, whole, ROWS):
            a = b = c = d = e = f = g = h = full(x, 0.0)
            for i in range(rows):
                value = load(x, i * wide + k)
                place = i * columns + j
                a = a + at(low, place) * value
                b = b + at(low, place + 1) * value
                c = c + at(low, place + 2) * value
                d = d + at(low, place + 3) * value
                e = e + at(low, place + 4) * value
                f = f + at(low, place + 5) * value
                g = g + at(low, place + 6) * value
                h = h + at(low, place + 7) * value
            accumulate(sums, lost, j * wide + k, a)
            accumulate(sums, lost, (j + 1) * wide + k, b)
            accumulate(sums, lost, (j + 2) * wide + k, c)
            accumulate(sums, lost, (j + 3) * wide + k, d)
            accumulate(sums, lost, (j + 4) * wide + k, e)
            accumulate(sums, lost, (j + 5) * wide + k, f)
            accumulate(sums, lost, (j + 6) * wide + k, g)
            accumulate(sums, lost, (j + 7) * wide + k, h)
        for j in range(whole, count):
            a = full(x, 0.0)
            for i in range(rows):
                a = a + at(low, i * columns + j) * load(x, i * wide + k)
            accumulate(sums, lost, j * wide + k, a)


@part
def back_project(low, columns, count, weight, kept, wide, out):
    """out [ROWS, E] *= du + low [ROWS, columns] weight [count, E]; du is the first of each tile's numbers in `kept`."""
    for k in range(0, wide, LANES):
        a, b = load(kept, 4 * k), load(kept, 4 * (wide + k))
        c, d = load(kept, 4 * (2 * wide + k)), load(kept, 4 * (3 * wide + k))
        e, f = load(kept, 4 * (4 * wide + k)), load(kept, 4 * (5 * wide + k))
        g, h = load(kept, 4 * (6 * wide + k)), load(kept, 4 * (7 * wide + k))
        for j in range(count):
            value = load(weight, j * wide + k)
            a = a + at(low, j) * value
            b = b + at(low, columns + j) * value
            c = c + at(low, 2 * columns + j) * value
            d = d + at(low, 3 * columns + j) * value
            e = e + at(low, 4 * columns + j) * value
            f = f + at(low, 5 * columns + j) * value
            g = g + at(low, 6 * columns + j) * value
            h = h + at(low, 7 * columns + j) * value
        store(out, k, a * load(out, k))
        store(out, wide + k, b * load(out, wide + k))
        store(out, 2 * wide + k, c * load(out, 2 * wide + k))
        store(out, 3 * wide + k, d * load(out, 3 * wide + k))
        store(out, 4 * wide + k, e * load(out, 4 * wide + k))
        store(out, 5 * wide + k, f * load(out, 5 * wide + k))
        store(out, 6 * wide + k, g * load(out, 6 * wide + k))
        store(out, 7 * wide + k, h * load(out, 7 * wide + k))


@entry
def backward(
    p, lengths, z, dy, dp, dz, sums, weights, transposed, scratch,
    first, last, batch, seqlen, dim, dstate, dt_rank, stride, has_z,
):  # fmt: skip
    """dp, dz and, in `sums` [groups, weights_size], the parameters' gradients, of the groups `first` to before `last`.

    All NaN for a row whose length is not in 1..seqlen.
    """
    size = weights_size(dim, dstate, dt_rank)
    w = as_weights(weights, dim, dstate, dt_rank)
    errors, scratch = scratch[:size], scratch[size:]
    lost_by = as_weights(errors, dim, dstate, dt_rank)
    wide = padded(dim)
    columns, states = padded(dt_rank + dstate), padded(dstate)
    transposed_C = transposed[dim * columns :]
    most = ((seqlen + stride - 1) // stride + ROWS - 1) // ROWS * ROWS
    u, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    d_raw, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    scan = as_scan(scratch, dim, dstate, dt_rank)
    scratch = scratch[scan_size(dim, dstate, dt_rank) :]
    raw, carried, C, CB = scan.raw, scan.carried, scan.C, scan.CB  # `carried` has the sum of dT in the end
    s, scratch = scratch[: 4 * wide], scratch[4 * wide :]  # the gradient of y before the gate; z, dy, dz
    # Of each position's tiles: du, ddt, dT and the slope of softplus.
    kept, scratch = scratch[: 4 * most * wide], scratch[4 * most * wide :]
    projected, scratch = scratch[: (ROWS + most) * columns], scratch[(ROWS + most) * columns :]  # then its gradient
    dC, scratch = scratch[: 2 * states], scratch[2 * states :]
    gX, scratch = scratch[: ROWS * dstate * LANES], scratch[ROWS * dstate * LANES :]

    for b in range(first * GROUP, min(batch, last * GROUP)):
        gradient = sums[b // GROUP * size : (b // GROUP + 1) * size]
        into = as_weights(gradient, dim, dstate, dt_rank)
        if b % GROUP == 0:
            fill(gradient, 0, size, 0)
            fill(errors, 0, size, 0)
        length = lengths[b]
        if length < 1 or length > seqlen:
            fill(dp, b * seqlen * dim, (b + 1) * seqlen * dim, np.nan)
            fill(dz, b * dim, (b + 1) * dim if has_z else b * dim, np.nan)
            continue
        newest = (b * seqlen + length - 1) * dim
        steps = (length + stride - 1) // stride
        read(dy, b * dim, 0, 1, dim, s)
        if has_z:
            read(z, b * dim, 0, 1, dim, s[wide:])
            for c in range(0, wide, LANES):
                gate = load(s, wide + c)
                store(s, 2 * wide + c, load(s, c))
                store(s, c, load(s, c) * gate * sigmoid(gate))
        start_scan(scan, wide, dstate)
        fill(dC, 0, 2 * states, 0)

        seen = steps
        for k in range(0, steps, ROWS):
            if not forget(scan, w.A, wide, dstate):
                seen = k
                break
            rows = min(ROWS, steps - k)
            low_rank = projected[k * columns :]
            read(p, newest - k * stride * dim, stride * dim, rows, dim, u)
            silu(u, rows * wide)
            project(u, transposed, dim, columns, low_rank)
            if k == 0:
                project_one(u, transposed_C, dim, states, C)
                for c in range(0, wide, LANES):
                    store(carried, 4 * c + LANES, load(w.D, c) * load(u, c))
                    accumulate(into.D, lost_by.D, c, load(s, c) * load(u, c))
            step_sizes(low_rank, columns, w, rows, dim, dt_rank, raw)
            for i in range(rows):
                for n in range(dstate):
                    CB[i * dstate + n] = C[n] * low_rank[i * columns + dt_rank + n]
            fill(CB, rows * dstate, ROWS * dstate, 0)
            fill(gX, 0, ROWS * dstate * LANES, 0)
            for c in range(0, wide, LANES):
                alive = c // LANES * (1 + dstate)
                count = scan.states[alive]
                if count == 0:
                    for i in range(rows):
                        place = 4 * ((k + i) * wide + c)
                        fill(kept, place, place + 4 * LANES, 0)
                    continue
                tile_gradients(
                    u, c, rows, wide, w.A, scan, alive + 1, count, dstate, load(s, c), kept[4 * (k * wide + c) :], gX,
                    into.A, lost_by.A,
                )  # fmt: skip
            for i in range(rows):
                for n in range(dstate):
                    place = i * columns + dt_rank + n
                    if not remembered(scan, n, wide, dstate):
                        low_rank[place] = 0
                        continue
                    sum_gX = total(load(gX, (i * dstate + n) * LANES))
                    dC[n], dC[states + n] = added(low_rank[place] * sum_gX, dC[n], dC[states + n])
                    low_rank[place] = C[n] * sum_gX

        if has_z:
            for c in range(0, wide, LANES):
                gate = load(s, wide + c)
                open_ = sigmoid(gate)
                slope_z = open_ * (1.0 + gate * (1.0 - open_))
                store(s, 3 * wide + c, load(s, 2 * wide + c) * load(carried, 4 * c + LANES) * slope_z)
            write(s, 3 * wide, dim, dz, b * dim)
        for t in range(seqlen):
            if t >= length or (length - 1 - t) % stride or (length - 1 - t) // stride >= seen:
                fill(dp, (b * seqlen + t) * dim, (b * seqlen + t + 1) * dim, 0)

        fill(carried, 0, 2 * wide, 0)
        for k in range((seen - 1) // ROWS * ROWS, -1, -ROWS):
            rows = min(ROWS, seen - k)
            low_rank = projected[k * columns :]
            for c in range(0, wide, LANES):
                sum_dT, lost = load(carried, c), load(carried, wide + c)
                bias = full(scratch, 0.0)
                for i in range(rows - 1, -1, -1):
                    _, ddt, dT, slope = quad(kept, 4 * ((k + i) * wide + c))
                    gradient = (ddt + sum_dT) * slope
                    store(d_raw, i * wide + c, gradient)
                    bias = bias + gradient
                    sum_dT, lost = added(dT, sum_dT, lost)
                accumulate(into.bias, lost_by.bias, c, bias)
                store(carried, c, sum_dT)
                store(carried, wide + c, lost)
            outer_products(low_rank, columns, dt_rank, rows, d_raw, wide, into.dt_proj, lost_by.dt_proj)
            for r in range(dt_rank):
                for i in range(rows):
                    gradient = full(scratch, 0.0)
                    for c in range(0, wide, LANES):
                        gradient = gradient + load(d_raw, i * wide + c) * load(w.dt_proj, r * wide + c)
                    low_rank[i * columns + r] = total(gradient)
            # p again, for u and for silu's derivative, which takes the place of the step sizes.
            read(p, newest - k * stride * dim, stride * dim, rows, dim, u)
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
                        accumulate(into.x_proj, lost_by.x_proj, row, at(dC, n) * load(u, c))
                    store(kept, 4 * c, gradient)
            back_project(low_rank, columns, dt_rank + dstate, w.x_proj, kept[4 * k * wide :], wide, raw)
            for i in range(rows):
                place = newest - (k + i) * stride * dim
                write(raw, i * wide, dim, dp, place)
            outer_products(low_rank, columns, dt_rank + dstate, rows, u, wide, into.x_proj, lost_by.x_proj)


@entry
def combine(sums, scratch, d_x_proj, d_dt_proj, d_bias, dA, dD, dim, dstate, dt_rank):
    """Add up the groups' gradients, in order, and write them in the parameters' usual layouts."""
    wide = padded(dim)
    size = weights_size(dim, dstate, dt_rank)
    result, lost = scratch[:size], scratch[size:]
    fill(result, 0, size, 0)
    fill(lost, 0, size, 0)
    for start in range(0, sums.size, size):
        for c in range(0, size, LANES):
            accumulate(result, lost, c, load(sums, start + c))
    w = as_weights(result, dim, dstate, dt_rank)
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
