"""The scan at all positions.

    h_t = exp(dt_t A) h_{t-1} + B_t w_t      w_t = dt_t u_t      dt_t = [softplus](delta_t + bias)
    y_t = (C_t . h_t + D u_t) [silu(z_t)]

One tile of channels of a sequence after another, BLOCK positions at a time. Two states at once go through these in
registers, which shares the loads of dt and w; from block to block states are in the first-level cache. Those at the
start of every block but the first are kept for the gradient (`selective_scan_gradients.py`).

Every exponential is multiplied onto all that is older: hence `decay`, as the error of `exp2` would grow with the number
of positions that a state remembers.

Arrays are flat and contiguous. `dim` is in whole Lanes and `dstate` even: a padding channel has no input, a padding
state neither that nor an output.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .compiler import inline, part
from .elementary import decay, sigmoid, softplus
from .selective_scan import BLOCK
from .simd import LANES, at, full, load, store
from .slices import sliced

FIELDS = 8  # Lanes in a position's record, which the passes over the states share; here dt, w and y


class Scan(NamedTuple):
    """What both passes read; positions are those of all rows of the batch, one after another."""

    u: np.ndarray  # [positions, dim]
    delta: np.ndarray  # [positions, dim]
    A: np.ndarray  # [dstate, dim], times log2(e)
    B: np.ndarray  # [positions, dstate]
    C: np.ndarray  # [positions, dstate]
    D: np.ndarray  # [dim]
    z: np.ndarray  # [positions, dim], or empty
    bias: np.ndarray  # [dim]
    initial: np.ndarray  # [sequences, dstate, dim], or empty
    starts: np.ndarray  # int64 [sequences + 1], positions
    dim: int
    dstate: int
    softplus: bool


@inline
def step_size(x, t, c):
    """dt of a tile of channels, and its derivative."""
    raw = load(x.delta, t * x.dim + c) + load(x.bias, c)
    if x.softplus:
        return softplus(raw)
    return raw, full(x.u, 1.0)


@inline
def checkpoint(x, row, t):
    """Where the states before position t are kept, a block's first but not the sequence's.

    One place for each BLOCK positions of all rows is enough, wherever sequences end.
    """
    start = x.starts[row]
    return (start // BLOCK + (t - start) // BLOCK - 1) * x.dstate * x.dim


@register_jitable
def forward_scratch(dstate):
    """Elements that `forward` needs."""
    return (dstate + BLOCK * FIELDS) * LANES


@part
def _advance(x, c, n, t, rows, h, records):
    """`rows` positions of the states n and n + 1 of a tile: h goes on, and y in the records grows."""
    a0, a1 = load(x.A, n * x.dim + c), load(x.A, (n + 1) * x.dim + c)
    h0, h1 = load(h, n * LANES), load(h, (n + 1) * LANES)
    for i in range(rows):
        place, here = (t + i) * x.dstate + n, i * FIELDS * LANES
        dt, w = load(records, here), load(records, here + LANES)
        h0 = decay(a0 * dt) * h0 + at(x.B, place) * w
        h1 = decay(a1 * dt) * h1 + at(x.B, place + 1) * w
        y = load(records, here + 2 * LANES)
        store(records, here + 2 * LANES, y + at(x.C, place) * h0 + at(x.C, place + 1) * h1)
    store(h, n * LANES, h0)
    store(h, (n + 1) * LANES, h1)


@part
def _tile(x, row, c, h, records, y, checkpoints):
    """y of one tile of channels of a sequence, from h on, which is its last state in the end."""
    start, end = x.starts[row], x.starts[row + 1]
    D = load(x.D, c)
    for t in range(start, end, BLOCK):
        rows = min(BLOCK, end - t)
        if checkpoints.size > 0 and t > start:
            place = checkpoint(x, row, t) + c
            for n in range(x.dstate):
                store(checkpoints, place + n * x.dim, load(h, n * LANES))
        for i in range(rows):
            here = i * FIELDS * LANES
            u = load(x.u, (t + i) * x.dim + c)
            dt, _ = step_size(x, t + i, c)
            store(records, here, dt)
            store(records, here + LANES, dt * u)
            store(records, here + 2 * LANES, D * u)
        for n in range(0, x.dstate, 2):
            _advance(x, c, n, t, rows, h, records)
        for i in range(rows):
            value, place = load(records, i * FIELDS * LANES + 2 * LANES), (t + i) * x.dim + c
            if x.z.size > 0:
                gate = load(x.z, place)
                value = value * (gate * sigmoid(gate))
            store(y, place, value)


@sliced
def forward(first, last, scratch, x, y, last_states, checkpoints):
    """y [positions, dim] of the tiles from `first` to before `last`, those of a sequence one after another.

    And their last states [sequences, dstate, dim], and the checkpoints, unless these arrays are empty.
    """
    tiles = x.dim // LANES
    h, records = scratch[: x.dstate * LANES], scratch[x.dstate * LANES :]
    for tile in range(first, last):
        row, c = tile // tiles, tile % tiles * LANES
        place = row * x.dstate * x.dim + c
        for n in range(x.dstate):
            store(h, n * LANES, load(x.initial, place + n * x.dim) if x.initial.size > 0 else full(h, 0.0))
        _tile(x, row, c, h, records, y, checkpoints)
        if last_states.size > 0:
            for n in range(x.dstate):
                store(last_states, place + n * x.dim, load(h, n * LANES))
