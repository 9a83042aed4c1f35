"""The gradient of the scan at all positions. With gy = dy silu(z), and g the gradient of a state, from the end:

    g_t = C_t gy_t + exp(dt_{t+1} A) g_{t+1}      at the last position plus the gradient of the last state
    dC_t = sum_e gy_t h_t      dB_t = sum_e g_t w_t      dw_t = B_t . g_t
    q_t = exp(dt_t A) g_t h_{t-1}      dA = sum_t dt_t q_t      ddt_t = u_t dw_t + A . q_t, then through softplus
    du_t = D gy_t + dt_t dw_t      dD = sum_t gy_t u_t      dz_t = dy_t (C_t . h_t + D u_t) silu'(z_t)

Blocks of positions come from the last one on. In a block and a tile of channels, two states at once go forth from what
`forward` has kept of them, leaving each position's decay and state in the first-level cache, and back again.

Sums over channels are kept for a block, until all tiles have been added; a quarter of a tile wide, or they would fill
that cache. Sums over a block's positions are plain, those over blocks and over the rows of a group compensated.
Groups are added in order: nothing depends on how they are spread over threads.
"""

from __future__ import annotations

from numba.extending import register_jitable

from .compiler import inline, part
from .elementary import LOG2_E, decay, sigmoid
from .parts import accumulate, fill, quad, store_quad
from .selective_scan_kernels import BLOCK, FIELDS, checkpoint, step_size
from .simd import HALF, LANES, at, folded, full, load, load_half, side_by_side, store, totals_of_quarters
from .slices import sliced

GROUP = 4  # sequences whose gradients of A, D and the bias are one sum
LN_2 = 1 / LOG2_E


@register_jitable
def backward_scratch(dim, dstate):
    """Elements that `backward` needs."""
    return BLOCK * dstate * (HALF + 1) + 2 * (dstate + 1) * dim + BLOCK * (FIELDS + 4) * LANES


@inline
def _before(x, row, t, place, checkpoints):
    """A state before position t."""
    if t > x.starts[row]:
        return load(checkpoints, checkpoint(x, row, t) + place)
    if x.initial.size > 0:
        return load(x.initial, row * x.dstate * x.dim + place)
    return full(x.u, 0.0)


@part
def _states(x, row, c, t, rows, checkpoints, dh, records, kept, dB, dC, sums, lost):
    """All states of a tile through `rows` positions, forth and back: dh goes on, and all sums grow."""
    for n in range(0, x.dstate, 2):
        first = n * x.dim + c
        second = first + x.dim
        a0, a1 = load(x.A, first), load(x.A, second)
        h0, h1 = _before(x, row, t, first, checkpoints), _before(x, row, t, second, checkpoints)
        for i in range(rows):
            place, here, pair = (t + i) * x.dstate + n, i * FIELDS * LANES, (n // 2 * BLOCK + i) * HALF
            dt, w, gy, y = quad(records, here)
            e0, e1 = decay(a0 * dt), decay(a1 * dt)
            store_quad(kept, 4 * i * LANES, e0, h0, e1, h1)
            h0 = e0 * h0 + at(x.B, place) * w
            h1 = e1 * h1 + at(x.B, place + 1) * w
            store(records, here + 3 * LANES, y + at(x.C, place) * h0 + at(x.C, place + 1) * h1)
            store(dC, pair, load_half(dC, pair) + side_by_side(folded(gy * h0), folded(gy * h1)))
        g0, g1 = load(dh, first), load(dh, second)
        dA0 = dA1 = full(x.u, 0.0)
        for i in range(rows - 1, -1, -1):
            place, here, pair = (t + i) * x.dstate + n, i * FIELDS * LANES, (n // 2 * BLOCK + i) * HALF
            dt, w, gy = load(records, here), load(records, here + LANES), load(records, here + 2 * LANES)
            g0 = g0 + at(x.C, place) * gy
            g1 = g1 + at(x.C, place + 1) * gy
            store(dB, pair, load_half(dB, pair) + side_by_side(folded(g0 * w), folded(g1 * w)))
            dw = load(records, here + 4 * LANES)
            store(records, here + 4 * LANES, dw + at(x.B, place) * g0 + at(x.B, place + 1) * g1)
            e0, h0, e1, h1 = quad(kept, 4 * i * LANES)
            g0, g1 = e0 * g0, e1 * g1
            q0, q1 = g0 * h0, g1 * h1
            Aq = load(records, here + 5 * LANES)
            store(records, here + 5 * LANES, Aq + a0 * q0 + a1 * q1)
            dA0, dA1 = dA0 + dt * q0, dA1 + dt * q1
        store(dh, first, g0)
        store(dh, second, g1)
        accumulate(sums, lost, first, dA0)
        accumulate(sums, lost, second, dA1)


@part
def _begin(x, c, t, rows, dy, records):
    """The records of a tile's positions: dt, w, gy, y before the gate, dw, A . q log2(e), softplus', dy silu'(z).

    y, dw and A . q will be sums over the states.
    """
    D = load(x.D, c)
    for i in range(rows):
        place, here = (t + i) * x.dim + c, i * FIELDS * LANES
        u, gy = load(x.u, place), load(dy, place)
        dt, slope = step_size(x, t + i, c)
        if x.z.size > 0:
            gate = load(x.z, place)
            open_ = sigmoid(gate)
            store(records, here + 7 * LANES, gy * (open_ * (1.0 + gate * (1.0 - open_))))
            gy = gy * (gate * open_)
        store_quad(records, here, dt, dt * u, gy, D * u)
        store(records, here + 4 * LANES, 0.0)
        store(records, here + 5 * LANES, 0.0)
        store(records, here + 6 * LANES, slope)


@part
def _end(x, c, t, rows, records, du, ddelta, dz, sums, lost):
    """What the records have become, as gradients."""
    D = load(x.D, c)
    dD = dbias = full(x.u, 0.0)
    for i in range(rows):
        place, here = (t + i) * x.dim + c, i * FIELDS * LANES
        dt, _, gy, y = quad(records, here)
        dw, Aq, slope, dgate = quad(records, here + 4 * LANES)
        u = load(x.u, place)
        gradient = (u * dw + LN_2 * Aq) * slope
        store(du, place, D * gy + dt * dw)
        store(ddelta, place, gradient)
        if x.z.size > 0:
            store(dz, place, dgate * y)
        dD, dbias = dD + gy * u, dbias + gradient
    accumulate(sums, lost, x.dstate * x.dim + c, dD)
    accumulate(sums, lost, (x.dstate + 1) * x.dim + c, dbias)


@part
def _sum_channels(quarters, rows, dstate, summed, out, start):
    """out [rows, dstate] from `start` on = the sums over the last axis of [dstate / 2, BLOCK, 2, LANES / 4]."""
    for j in range(0, BLOCK * dstate, HALF):
        totals_of_quarters(quarters, j // 2 * HALF, summed, j)
    for i in range(rows):
        for n in range(0, dstate, 2):
            out[start + i * dstate + n] = summed[n * BLOCK + 2 * i]
            out[start + i * dstate + n + 1] = summed[n * BLOCK + 2 * i + 1]


@sliced
def backward(
    first, last, scratch, x, checkpoints, dy, dlast, du, ddelta, dz, dB, dC, dinitial, sums
):  # fmt: skip
    """All gradients of the groups from `first` to before `last`.

    dA, dD and dbias, in `sums` [groups, dstate + 2, dim], are those of a group. `dlast`, as the last states, may be
    empty.
    """
    wide, size = x.dstate * x.dim, (x.dstate + 2) * x.dim
    lost, scratch = scratch[:size], scratch[size:]
    dh, scratch = scratch[:wide], scratch[wide:]  # [dstate, dim], of a sequence
    records, scratch = scratch[: BLOCK * FIELDS * LANES], scratch[BLOCK * FIELDS * LANES :]
    kept, scratch = scratch[: BLOCK * 4 * LANES], scratch[BLOCK * 4 * LANES :]
    several = BLOCK * x.dstate // 2 * HALF  # dB and dC of a block, not yet summed
    dB_parts, dC_parts, summed = scratch[:several], scratch[several : 2 * several], scratch[2 * several :]
    for group in range(first, last):
        own = sums[group * size : (group + 1) * size]
        fill(own, 0, size, 0)
        fill(lost, 0, size, 0)
        for row in range(group * GROUP, min(x.starts.size - 1, (group + 1) * GROUP)):
            for c in range(0, wide, LANES):
                store(dh, c, load(dlast, row * wide + c) if dlast.size > 0 else full(dh, 0.0))
            start, end = x.starts[row], x.starts[row + 1]
            for block in range((end - start - 1) // BLOCK, -1, -1):
                t = start + block * BLOCK
                rows = min(BLOCK, end - t)
                fill(dB_parts, 0, several, 0)
                fill(dC_parts, 0, several, 0)
                for c in range(0, x.dim, LANES):
                    _begin(x, c, t, rows, dy, records)
                    _states(
                        x, row, c, t, rows, checkpoints, dh, records, kept, dB_parts, dC_parts, own, lost
                    )  # fmt: skip
                    _end(x, c, t, rows, records, du, ddelta, dz, own, lost)
                _sum_channels(dB_parts, rows, x.dstate, summed, dB, t * x.dstate)
                _sum_channels(dC_parts, rows, x.dstate, summed, dC, t * x.dstate)
            for c in range(0, wide if dinitial.size > 0 else 0, LANES):
                store(dinitial, row * wide + c, load(dh, c))
