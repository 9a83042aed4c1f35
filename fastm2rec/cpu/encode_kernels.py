"""Item ids to query vectors, row by row: what `reference/encode_last.py` computes, in float32 or float64.

What a row feeds to its scan is that of `row_kernels.py`, the scan that of `parts.py`. What follows it, at the last
position alone, is done for ROWS rows of the batch at once. A row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .compiler import part
from .elementary import gelu, sigmoid
from .parts import (
    ROWS,
    as_scan,
    as_weights,
    fill,
    forget,
    padded,
    project,
    read,
    scan_block,
    scan_size,
    scanned,
    silu,
    start_scan,
)  # fmt: skip
from .row_kernels import INPUT, NONE, read_block, spectrum_of, transform
from .simd import LANES, at, full, load, store, total
from .slices import sliced
from .symmetry_kernels import GROUP

LINEAR, CONSTANT, CONTEXT = range(1, 4)  # the gate; NONE has none


class Shape(NamedTuple):
    """Numbers of a model."""

    n_items: int
    max_len: int
    dim: int
    dstate: int
    dt_rank: int
    d_model: int
    hidden: int
    width: int  # of the convolution
    columns: int  # of a basis, rounded up to ROWS
    orbits: int  # of the basis that has most of them, rounded up to 2
    slots: int  # in these
    placement: int
    valid: int  # a basis for each length, rather than one
    stride: int
    gate: int
    residual: int
    scan_norm: int


class Tables(NamedTuple):
    """Rows for each item, padded to whole Lanes; empty where the model has none."""

    u: np.ndarray  # [n_items + 1, E]
    z: np.ndarray  # [n_items + 1, E]
    text: np.ndarray  # [n_items + 1, D]
    gate: np.ndarray  # [n_items + 1, 2 D]


class Head(NamedTuple):
    """Matrices as they are applied, [in, padded(out)], and rows padded to whole Lanes."""

    taps: np.ndarray  # [width, E], the convolution's weight at a delay of 0, 1, ... positions
    conv_bias: np.ndarray  # [E]
    scan_norm: np.ndarray  # [2, E], weight and bias; likewise the other norms
    out_proj: np.ndarray  # [dim, D]
    norm: np.ndarray  # [2, D]
    fc1: np.ndarray  # [d_model, H]
    fc1_bias: np.ndarray  # [H]
    fc2: np.ndarray  # [hidden, D]
    fc2_bias: np.ndarray  # [D]
    ffn_norm: np.ndarray  # [2, D]
    mix: np.ndarray  # [d_model, D]
    mix_bias: np.ndarray  # [D]
    gate: np.ndarray  # [d_model, 2 D]


def scratch_size(shape: Shape) -> int:
    """Elements that `encode` needs."""
    scan = scan_size(shape.dim, shape.dstate, shape.dt_rank)
    rows = (shape.slots + shape.columns + 1 + ROWS) * padded(shape.dim)
    return rows + scan + last_size(shape) + (shape.slots + GROUP - 1) // GROUP


class Last(NamedTuple):
    """What follows the scan at the last position of ROWS rows."""

    y: np.ndarray  # [ROWS, E], the scan's output
    z: np.ndarray  # [ROWS, E]
    h: np.ndarray  # [ROWS, D]; the queries are here or, with a gate, in
    mixed: np.ndarray  # [ROWS, D]
    gates: np.ndarray  # [ROWS, 2 D]
    hidden: np.ndarray  # [ROWS, H]
    ids: np.ndarray  # int32 [ROWS], the last items


@register_jitable
def last_size(shape):
    """Elements of `Last`."""
    return ROWS * (2 * padded(shape.dim) + 4 * padded(shape.d_model) + padded(shape.hidden) + 1)


@part
def as_last(flat, shape):
    """Of rows that are not there, which are computed as well, the input is 0."""
    z, h = ROWS * padded(shape.dim), 2 * ROWS * padded(shape.dim)
    mixed = h + ROWS * padded(shape.d_model)
    gates = mixed + ROWS * padded(shape.d_model)
    hidden = gates + 2 * ROWS * padded(shape.d_model)
    ids = hidden + ROWS * padded(shape.hidden)
    fill(flat, 0, h, 0)
    fill(flat, ids, ids + ROWS, 0)
    return Last(
        flat[:z], flat[z:h], flat[h:mixed], flat[mixed:gates], flat[gates:hidden], flat[hidden:ids],
        flat[ids : ids + ROWS].view(np.int32),
    )  # fmt: skip


@part
def _layer_norm(x, norm, size, eps):
    """Each of ROWS rows [padded(size)], in place; what is padding stays zero."""
    wide = padded(size)
    for i in range(ROWS):
        row = full(x, 0.0)
        for c in range(0, wide, LANES):
            row = row + load(x, i * wide + c)
        mean = total(row) / size
        row = full(x, 0.0)
        for c in range(0, wide, LANES):
            centred = load(x, i * wide + c) - mean
            row = row + centred * centred
        variance = (total(row) - (wide - size) * mean * mean) / size
        scale = 1.0 / np.sqrt(variance + eps)
        for c in range(0, wide, LANES):
            store(x, i * wide + c, (load(x, i * wide + c) - mean) * scale * load(norm, c) + load(norm, wide + c))


@part
def _add_row(x, row, start, wide):
    """x [ROWS, wide] += row[start:]."""
    for i in range(ROWS):
        for c in range(0, wide, LANES):
            store(x, i * wide + c, load(x, i * wide + c) + load(row, start + c))


@part
def queries(last, shape, head, tables, eps):
    """From the scan's outputs and z to the queries, in h or, with a gate, in mixed."""
    y, h, mixed, gates, hidden = last.y, last.h, last.mixed, last.gates, last.hidden
    wide, d = padded(shape.dim), padded(shape.d_model)
    if shape.scan_norm:
        _layer_norm(y, head.scan_norm, shape.dim, eps)
    for c in range(0, ROWS * wide, LANES):
        gate = load(last.z, c)
        store(y, c, load(y, c) * (gate * sigmoid(gate)))
    project(y, head.out_proj, shape.dim, d, h)
    _layer_norm(h, head.norm, shape.d_model, eps)
    project(h, head.fc1, shape.d_model, padded(shape.hidden), hidden)
    _add_row(hidden, head.fc1_bias, 0, padded(shape.hidden))
    gelu(hidden, ROWS * padded(shape.hidden))
    project(hidden, head.fc2, shape.hidden, d, mixed)
    for c in range(0, ROWS * d, LANES):
        store(h, c, load(h, c) + load(mixed, c))
    _add_row(h, head.fc2_bias, 0, d)
    _layer_norm(h, head.ffn_norm, shape.d_model, eps)
    if shape.gate == NONE:
        return
    if shape.gate == CONTEXT:
        project(h, head.gate, shape.d_model, 2 * d, gates)
        for i in range(ROWS):
            item = last.ids[i]
            for c in range(0, d, LANES):
                alpha = sigmoid(load(gates, 2 * i * d + c) + load(tables.gate, 2 * item * d + c))
                beta = sigmoid(load(gates, (2 * i + 1) * d + c) + load(tables.gate, (2 * item + 1) * d + c))
                store(gates, i * d + c, alpha * load(tables.text, item * d + c) + beta * load(h, i * d + c))
        project(gates, head.mix, shape.d_model, d, mixed)
    else:
        project(h, head.mix, shape.d_model, d, mixed)
        if shape.gate == CONSTANT:
            for i in range(ROWS):
                for c in range(0, d, LANES):
                    text = load(tables.text, last.ids[i] * d + c)
                    store(mixed, i * d + c, load(mixed, i * d + c) + text)
    _add_row(mixed, head.mix_bias, 0, d)
    if shape.residual:
        for c in range(0, ROWS * d, LANES):
            store(mixed, c, load(mixed, c) + load(h, c))


@part
def known(ids, start, length, seqlen, n_items):
    """Is the row sound, so that nothing is read out of bounds?"""
    if length < 1 or length > seqlen:
        return False
    for t in range(start, start + length):  # noqa: SIM110 (numba knows no `all`)
        if ids[t] < 1 or ids[t] > n_items:
            return False
    return True


@part
def take_last(ids, start, n, shape, tables, filter, last, i):
    """The last item of a row, and its z, filtered where the model's input is, for row i of `last`."""
    wide = padded(shape.dim)
    z, place, item = last.z, i * wide, ids[start + n - 1]
    last.ids[i] = item
    if shape.placement == INPUT:
        for c in range(0, wide, LANES):
            value = full(z, 0.0)
            for t in range(n):
                weight = at(filter.last, (n - 1) * shape.max_len + t)
                value = value + weight * load(tables.z, ids[start + t] * wide + c)
            store(z, place + c, value)
    else:
        read(tables.z, item * wide, 0, 1, wide, z[place:])


@part
def _scan_row(ids, start, n, shape, table, filter, head, w, transposed, one, x, bins, done, u, scan):
    """Items to the scan's state."""
    wide = padded(shape.dim)
    spectrum = spectrum_of(n, shape, filter)
    if shape.placement != NONE:
        transform(ids, start, n, shape, table, filter, spectrum, head, one, wide, 0, wide, x, bins)
        for group in range(done.size):
            done[group] = 0
    steps = (n + shape.stride - 1) // shape.stride
    start_scan(scan, 0, wide, shape.dstate)
    for k in range(0, steps, ROWS):
        if not forget(scan, w, 0, wide, shape.dstate):
            break
        rows = min(ROWS, steps - k)
        t = n - 1 - k * shape.stride
        read_block(ids, start, n, t, rows, shape, table, filter, spectrum, head, bins, wide, 0, wide, x, done, u)
        silu(u, rows * wide)
        scan_block(u, rows, k == 0, w, transposed, scan, shape.dim, shape.dstate, shape.dt_rank)


@sliced
def encode(
    first, last, scratch, ids, lengths, out, unsound, seqlen, shape, tables, filter, head, weights, transposed, eps
):  # fmt: skip
    """The queries [batch, d_model] of the rows from `first` to before `last`.

    NaN where one is not sound; then `unsound` [1] becomes 1.
    """
    wide, d = padded(shape.dim), padded(shape.d_model)
    w = as_weights(weights, shape.dim, shape.dstate, shape.dt_rank)
    x, scratch = scratch[: shape.slots * wide], scratch[shape.slots * wide :]
    bins, scratch = scratch[: shape.columns * wide], scratch[shape.columns * wide :]
    one, scratch = scratch[:wide], scratch[wide:]
    u, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    size = scan_size(shape.dim, shape.dstate, shape.dt_rank)
    scan, scratch = as_scan(scratch[:size], shape.dim, shape.dstate, shape.dt_rank), scratch[size:]
    ends, done = as_last(scratch, shape), scratch[last_size(shape) :].view(np.int32)
    fill(one, 0, wide, 1)
    for group in range(first, last, ROWS):
        count = min(ROWS, last - group)
        for i in range(count):
            start, n = (group + i) * seqlen, lengths[group + i]
            if not known(ids, start, n, seqlen, shape.n_items):
                ends.ids[i] = 0
                fill(ends.y, i * wide, (i + 1) * wide, np.nan)
                unsound[0] = 1
                continue
            _scan_row(ids, start, n, shape, tables.u, filter, head, w, transposed, one, x, bins, done, u, scan)
            scanned(scan, 0, wide, ends.y, i * wide)
            take_last(ids, start, n, shape, tables, filter, ends, i)
        queries(ends, shape, head, tables, eps)
        found = ends.h if shape.gate == NONE else ends.mixed
        for i in range(count):
            for c in range(shape.d_model):
                out[(group + i) * shape.d_model + c] = found[i * d + c]
