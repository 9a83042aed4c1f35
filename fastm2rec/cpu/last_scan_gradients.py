"""The gradient of the last position's scan: two passes over each row.

With the terms of `last_scan_kernels.py`, X = exp(A T), s the gradient of y before the gate, and g = s dt u:

    dC_n = sum g B X      dB_n = C_n sum_e g X      dA_n = sum_t g T C_n B X
    h = s sum_n C_n B X      dT = g sum_n C_n B A X      ddt_t = h u_t + sum_{r < t} dT_r
    du = h dt + what comes back through x_proj, C and D

The first pass goes backward in time, as the forward does, recomputing everything, and keeps of each channel and
position u, silu's derivative and four numbers more. The second goes forward in time, where the sum of the dT is known.
The gradients of the parameters are summed over groups of rows, and those sums in order: they do not depend on how the
groups are spread over threads. Sums of up to CHUNK positions are plain, those over chunks and rows compensated.

Processors store one register in the time of two or three products: what is summed over channels is kept half a tile
wide, and what is summed over positions stays in registers for as many as possible.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from .compiler import entry, part
from .elementary import LOG2_E, exp2, sigmoid, softplus
from .parts import (
    ROWS,
    accumulate,
    added,
    as_scan,
    as_weights,
    fill,
    forget,
    padded,
    project_one,
    quad,
    read,
    scan_size,
    start_scan,
    step_sizes,
    store_quad,
    weights_size,
    write,
)  # fmt: skip
from .product_kernels import contract_row, expand_row, scratch_size
from .simd import HALF, LANES, at, folded, full, load, load_half, put, store, totals
from .slices import sliced

CHUNK = 64  # positions, a multiple of ROWS
LN_2 = 1 / LOG2_E


def rows_of_group(batch: int) -> int:
    """Rows of the batch whose parameter gradients are summed together: few for a small one, which threads share.

    Twice as many make half the sums: 5 % of this kernel's time at 256 x 50.
    """
    return 8 if batch <= 128 else 16


@register_jitable
def _sums_size(dstate, dt_rank):
    """Rows of HALF numbers that are summed together: ROWS positions' states, or ranks, in whole blocks of HALF."""
    return (ROWS * max(dstate, dt_rank) + HALF - 1) // HALF * HALF


@register_jitable
def backward_scratch(products, seqlen, dim, dstate, dt_rank, stride):
    """Elements that `backward` needs."""
    steps = ((seqlen + stride - 1) // stride + ROWS - 1) // ROWS * ROWS
    return (
        weights_size(dim, dstate, dt_rank)
        + scan_size(dim, dstate, dt_rank)
        + (4 + dstate + 6 * steps) * padded(dim)
        + steps * padded(dt_rank + dstate)
        + 2 * padded(dstate)
        + _sums_size(dstate, dt_rank) * (HALF + 1)
        + products.seqlen * dim
        + scratch_size(products)
    )


@part
def _tile_gradients(u, c, rows, wide, A, scan, first_state, count, dstate, ds, kept, gX, dA):
    """`rows` positions of one tile of channels: y and T go on, and what the gradients need is kept, as above."""
    T, value, lost_T, lost = quad(scan.carried, 4 * c)
    times, gains = scan.times, scan.gains
    for i in range(rows):
        dt, slope = softplus(load(scan.raw, i * wide + c))
        store(times, i * LANES, T)
        store(gains, i * LANES, ds * dt * load(u, i * wide + c))
        store(kept, 4 * i * wide, dt)
        store(kept, 4 * i * wide + 3 * LANES, slope)
        T, lost_T = added(dt, T, lost_T)
    if rows % 2:
        store(times, rows * LANES, 0.0)
        store(gains, rows * LANES, 0.0)
    for i in range(0, rows, 2):
        t0, t1 = load(times, i * LANES), load(times, i * LANES + LANES)
        g0, g1 = load(gains, i * LANES), load(gains, i * LANES + LANES)
        gt0, gt1 = g0 * t0, g1 * t1
        k0 = k1 = r0 = r1 = full(u, 0.0)
        for j in range(first_state, first_state + count):
            n = at(scan.states, j)
            rate = load(A, n * LANES)
            place, state = i * dstate + n, n * LANES
            X = exp2(rate * t0)
            store(gX, place * HALF, load_half(gX, place * HALF) + folded(g0 * X))
            X = at(scan.CB, place) * X
            k0, r0, sum_ = k0 + X, r0 + rate * X, gt0 * X
            X, place = exp2(rate * t1), place + dstate
            store(gX, place * HALF, load_half(gX, place * HALF) + folded(g1 * X))
            X = at(scan.CB, place) * X
            k1, r1, sum_ = k1 + X, r1 + rate * X, sum_ + gt1 * X
            store(dA, state, load(dA, state) + sum_)
        store(scan.kernels, i * LANES, k0)
        store(scan.kernels, i * LANES + LANES, k1)
        store(scan.rates, i * LANES, r0)
        store(scan.rates, i * LANES + LANES, r1)
    for i in range(rows):
        dt, x, kernel = load(kept, 4 * i * wide), load(u, i * wide + c), load(scan.kernels, i * LANES)
        h = ds * kernel
        store(kept, 4 * i * wide, h * dt)
        store(kept, 4 * i * wide + LANES, h * x)
        store(kept, 4 * i * wide + 2 * LANES, load(gains, i * LANES) * load(scan.rates, i * LANES) * LN_2)
        value, lost = added(dt * x * kernel, value, lost)
    store_quad(scan.carried, 4 * c, T, value, lost_T, lost)


@part
def _outer_products(low, columns, count, steps, x, first, step, tile, wide, sums, lost):
    """sums [count, E] += low [steps, columns]^T x [steps, E], of the first `count` columns.

    Position t's channels c to c + LANES are at x[first + t * step + tile * c :].
    """
    for start in range(0, steps, CHUNK):
        stop = min(start + CHUNK, steps)
        for k in range(0, wide, LANES):
            base = first + tile * k
            for j in range(0, count - 3, 4):
                a = b = c = d = full(x, 0.0)
                for t in range(start, stop):
                    value = load(x, base + t * step)
                    place = t * columns + j
                    a = a + at(low, place) * value
                    b = b + at(low, place + 1) * value
                    c = c + at(low, place + 2) * value
                    d = d + at(low, place + 3) * value
                accumulate(sums, lost, j * wide + k, a)
                accumulate(sums, lost, (j + 1) * wide + k, b)
                accumulate(sums, lost, (j + 2) * wide + k, c)
                accumulate(sums, lost, (j + 3) * wide + k, d)
            for j in range(count // 4 * 4, count):
                a = full(x, 0.0)
                for t in range(start, stop):
                    a = a + at(low, t * columns + j) * load(x, base + t * step)
                accumulate(sums, lost, j * wide + k, a)


@part
def _back_project(low, columns, count, weight, kept, slopes, wide, out):
    """out [ROWS, E] = slopes * (du + low [ROWS, columns] weight [count, E]); du is the first of `kept`'s four."""
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
        store(out, k, a * load(slopes, k))
        store(out, wide + k, b * load(slopes, wide + k))
        store(out, 2 * wide + k, c * load(slopes, 2 * wide + k))
        store(out, 3 * wide + k, d * load(slopes, 3 * wide + k))
        store(out, 4 * wide + k, e * load(slopes, 4 * wide + k))
        store(out, 5 * wide + k, f * load(slopes, 5 * wide + k))
        store(out, 6 * wide + k, g * load(slopes, 6 * wide + k))
        store(out, 7 * wide + k, h * load(slopes, 7 * wide + k))


@part
def _sum_blocks(x, count, out):
    """out[:count] = the sums of the rows of HALF numbers in x, and nothing of use up to whole blocks of HALF."""
    for j in range(0, count, HALF):
        totals(x, j * HALF, out, j)


@sliced
def backward(
    first, last, scratch, p, products, lengths, z, dy, low_rank, order, dp, dz, sums, weights, transposed, batch,
    group, seqlen, dim, dstate, dt_rank, stride, has_z,
):  # fmt: skip
    """dp, dz and, in `sums` [groups, weights_size], the parameters' gradients, of the groups `first` to before `last`.

    All NaN for a row whose length is not in 1..seqlen. `low_rank` is what `forward` left; p, `products` and `order` are
    what it took.
    """
    size = weights_size(dim, dstate, dt_rank)
    w = as_weights(weights, dim, dstate, dt_rank)
    errors, scratch = scratch[:size], scratch[size:]
    lost_by = as_weights(errors, dim, dstate, dt_rank)
    wide = padded(dim)
    count, columns, states = dt_rank + dstate, padded(dt_rank + dstate), padded(dstate)
    slots = (seqlen + stride - 1) // stride
    transposed_C = transposed[dim * columns :]
    most = (slots + ROWS - 1) // ROWS * ROWS
    scan = as_scan(scratch, dim, dstate, dt_rank)
    scratch = scratch[scan_size(dim, dstate, dt_rank) :]
    raw, carried, C, CB = scan.raw, scan.carried, scan.C, scan.CB  # `carried` has the sum of dT in the end
    s, scratch = scratch[: 4 * wide], scratch[4 * wide :]  # the gradient of y before the gate; z, dy, dz
    u, scratch = scratch[: most * wide], scratch[most * wide :]
    slopes, scratch = scratch[: most * wide], scratch[most * wide :]  # silu's derivative
    # Of each position's tiles: du, ddt (later that before softplus), dT and the slope of softplus.
    kept, scratch = scratch[: 4 * most * wide], scratch[4 * most * wide :]
    projected, scratch = scratch[: most * columns], scratch[most * columns :]  # then its gradient
    dA, scratch = scratch[: dstate * wide], scratch[dstate * wide :]
    dC, scratch = scratch[: 2 * states], scratch[2 * states :]
    in_halves, scratch = scratch[: _sums_size(dstate, dt_rank) * HALF], scratch[_sums_size(dstate, dt_rank) * HALF :]
    summed, scratch = scratch[: _sums_size(dstate, dt_rank)], scratch[_sums_size(dstate, dt_rank) :]
    filtered = products.columns > 0
    whole, scratch = scratch[: products.seqlen * dim], scratch[products.seqlen * dim :]  # a row's p, then its gradient
    bins, folded_row = scratch[: products.columns * dim], scratch[products.columns * dim :]

    for b in range(first * group, min(batch, last * group)):
        gradient = sums[b // group * size : (b // group + 1) * size]
        into = as_weights(gradient, dim, dstate, dt_rank)
        if b % group == 0:
            fill(gradient, 0, size, 0)
            fill(errors, 0, size, 0)
        length = lengths[b]
        if length < 1 or length > seqlen:
            size_of_row = (products.kept if filtered else seqlen) * dim
            fill(dp, b * size_of_row, (b + 1) * size_of_row, np.nan)
            fill(dz, b * dim, (b + 1) * dim if has_z else b * dim, np.nan)
            continue
        if filtered:
            expand_row(p, b * products.kept * dim, products, 0, bins, whole, 0)
        source, target = (whole, whole) if filtered else (p, dp)
        oldest = 0 if filtered else b * seqlen * dim
        newest = oldest + (length - 1) * dim
        steps = (length + stride - 1) // stride
        fill(s, 0, 2 * wide, 0)
        for e in range(dim):
            put(s, e, at(dy, b * dim + at(order, e)))
        if has_z:
            for e in range(dim):
                put(s, wide + e, at(z, b * dim + at(order, e)))
            for c in range(0, wide, LANES):
                gate = load(s, wide + c)
                store(s, 2 * wide + c, load(s, c))
                store(s, c, load(s, c) * gate * sigmoid(gate))
        start_scan(scan, 0, wide, dstate)
        fill(dC, 0, 2 * states, 0)
        fill(dA, 0, dstate * wide, 0)

        seen = steps
        for k in range(0, steps, ROWS):
            if not forget(scan, w, 0, wide, dstate):
                seen = k
                break
            rows = min(ROWS, steps - k)
            block, low = u[k * wide :], projected[k * columns :]
            read(source, newest - k * stride * dim, stride * dim, rows, dim, block)
            for c in range(0, rows * wide, LANES):
                x = load(block, c)
                open_ = sigmoid(x)
                store(block, c, x * open_)
                store(slopes, k * wide + c, open_ * (1.0 + x * (1.0 - open_)))
            fill(block, rows * wide, ROWS * wide, 0)
            for i in range(rows):
                for j in range(count):
                    put(low, i * columns + j, at(low_rank, (b * slots + k + i) * count + j))
            if k == 0:
                project_one(block, transposed_C, dim, states, C)
                for c in range(0, wide, LANES):
                    store(carried, 4 * c + LANES, load(w.D, c) * load(block, c))
                    accumulate(into.D, lost_by.D, c, load(s, c) * load(block, c))
            step_sizes(low, columns, w, rows, wide, 0, wide, dt_rank, raw)
            for i in range(rows):
                for n in range(dstate):
                    put(CB, i * dstate + n, at(C, n) * at(low, i * columns + dt_rank + n))
            fill(CB, rows * dstate, ROWS * dstate, 0)
            fill(in_halves, 0, ROWS * dstate * HALF, 0)
            for c in range(0, wide, LANES):
                alive = c // LANES * (1 + dstate)
                left = at(scan.states, alive)
                if left == 0:
                    for i in range(rows):
                        place = 4 * ((k + i) * wide + c)
                        fill(kept, place, place + 4 * LANES, 0)
                    continue
                _tile_gradients(
                    block, c, rows, wide, w.A[c * dstate :], scan, alive + 1, left, dstate, load(s, c),
                    kept[4 * (k * wide + c) :], in_halves, dA[c * dstate :],
                )  # fmt: skip
            _sum_blocks(in_halves, rows * dstate, summed)
            for n in range(dstate):
                value = at(low, dt_rank + n) * at(summed, n)
                for i in range(1, rows):
                    value += at(low, i * columns + dt_rank + n) * at(summed, i * dstate + n)
                new, lost = added(value, at(dC, n), at(dC, states + n))
                put(dC, n, new)
                put(dC, states + n, lost)
                for i in range(rows):
                    put(low, i * columns + dt_rank + n, at(C, n) * at(summed, i * dstate + n))
            if (k + ROWS) % CHUNK == 0 or k + ROWS >= steps:
                for c in range(0, dstate * wide, LANES):
                    accumulate(into.A, lost_by.A, c, load(dA, c))
                    store(dA, c, 0.0)
        if seen < steps:
            for c in range(0, dstate * wide, LANES):
                accumulate(into.A, lost_by.A, c, load(dA, c))

        if has_z:
            for c in range(0, wide, LANES):
                gate = load(s, wide + c)
                open_ = sigmoid(gate)
                slope_z = open_ * (1.0 + gate * (1.0 - open_))
                store(s, 3 * wide + c, load(s, 2 * wide + c) * load(carried, 4 * c + LANES) * slope_z)
            for e in range(dim):
                put(dz, b * dim + at(order, e), at(s, 3 * wide + e))
        for t in range(seqlen):
            if t >= length or (length - 1 - t) % stride or (length - 1 - t) // stride >= seen:
                fill(target, oldest + t * dim, oldest + (t + 1) * dim, 0)

        for c in range(0, wide, LANES):
            sum_dT = lost = bias = lost_bias = full(s, 0.0)
            for t in range(seen - 1, -1, -1):
                place = 4 * (t * wide + c)
                _, ddt, dT, slope = quad(kept, place)
                gradient = (ddt + sum_dT) * slope
                store(kept, place + LANES, gradient)
                bias, lost_bias = added(gradient, bias, lost_bias)
                sum_dT, lost = added(dT, sum_dT, lost)
            accumulate(into.bias, lost_by.bias, c, bias)
        _outer_products(
            projected, columns, dt_rank, seen, kept, LANES, 4 * wide, 4, wide, into.dt_proj, lost_by.dt_proj
        )  # fmt: skip
        for k in range(0, seen, ROWS):
            rows = min(ROWS, seen - k)
            for i in range(rows):
                for r in range(dt_rank):
                    value = full(s, 0.0)
                    for c in range(0, wide, LANES):
                        value = value + load(kept, 4 * ((k + i) * wide + c) + LANES) * load(w.dt_proj, r * wide + c)
                    store(in_halves, (i * dt_rank + r) * HALF, folded(value))
            _sum_blocks(in_halves, rows * dt_rank, summed)
            for i in range(rows):
                for r in range(dt_rank):
                    put(projected, (k + i) * columns + r, at(summed, i * dt_rank + r))
        for c in range(0, wide, LANES):
            gradient = load(kept, 4 * c) + load(w.D, c) * load(s, c)
            for n in range(dstate):
                row = (dt_rank + dstate + n) * wide + c
                gradient = gradient + at(dC, n) * load(w.x_proj, row)
                accumulate(into.x_proj, lost_by.x_proj, row, at(dC, n) * load(u, c))
            store(kept, 4 * c, gradient)
        for k in range(0, seen, ROWS):
            _back_project(
                projected[k * columns :], columns, count, w.x_proj, kept[4 * k * wide :],
                slopes[k * wide :], wide, raw,
            )  # fmt: skip
            for i in range(min(ROWS, seen - k)):
                write(raw, i * wide, dim, target, newest - (k + i) * stride * dim)
        _outer_products(projected, columns, count, seen, u, 0, wide, 1, wide, into.x_proj, lost_by.x_proj)
        if filtered:
            contract_row(whole, 0, products, 0, bins, folded_row, dp, b * products.kept * dim)


@entry
def combine(sums, scratch, order, d_x_proj, d_dt_proj, d_bias, dA, dD, dim, dstate, dt_rank):
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
            d_x_proj[j * dim + order[e]] = w.x_proj[j * wide + e]
    for e in range(dim):
        for r in range(dt_rank):
            d_dt_proj[order[e] * dt_rank + r] = w.dt_proj[r * wide + e]
        tile, lane = e // LANES, e % LANES
        for n in range(dstate):
            dA[order[e] * dstate + n] = w.A[(tile * dstate + n) * LANES + lane]
        dD[order[e]] = w.D[e]
    for e in range(d_bias.size):
        d_bias[order[e]] = w.bias[e]
