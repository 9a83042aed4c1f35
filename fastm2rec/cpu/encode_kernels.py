"""Item ids to query vectors, row by row: what `reference/encode_last.py` computes, in float32 or float64.

What a row feeds to its scan is that of `row_kernels.py`, the scan that of `parts.py`. What follows it, at the last
position alone, is done for ROWS rows of the batch at once. A row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

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
    wide, d, hidden = padded(shape.dim), padded(shape.d_model), padded(shape.hidden)
    scan = scan_size(shape.dim, shape.dstate, shape.dt_rank)
    rows = (shape.slots + shape.columns + 1 + 3 * ROWS) * wide + ROWS * (4 * d + hidden)
    return rows + scan + ROWS + (shape.slots + GROUP - 1) // GROUP


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
def queries(y, z, last_ids, shape, head, tables, eps, h, hidden, mixed, gates):
    """From the scan's outputs and z, [ROWS, E], to the queries, in `h` or, with a gate, `mixed`: [ROWS, D]."""
    wide, d = padded(shape.dim), padded(shape.d_model)
    if shape.scan_norm:
        _layer_norm(y, head.scan_norm, shape.dim, eps)
    for c in range(0, ROWS * wide, LANES):
        gate = load(z, c)
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
            item = last_ids[i]
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
                    text = load(tables.text, last_ids[i] * d + c)
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
def gate_input(ids, start, n, shape, tables, filter, z, place):
    """z [E] of a row's last position, filtered where the model's input is, to z[place:]."""
    wide = padded(shape.dim)
    if shape.placement == INPUT:
        for c in range(0, wide, LANES):
            value = full(z, 0.0)
            for t in range(n):
                weight = at(filter.last, (n - 1) * shape.max_len + t)
                value = value + weight * load(tables.z, ids[start + t] * wide + c)
            store(z, place + c, value)
    else:
        read(tables.z, ids[start + n - 1] * wide, 0, 1, wide, z[place:])


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
    y, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    z, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    size = scan_size(shape.dim, shape.dstate, shape.dt_rank)
    scan, scratch = as_scan(scratch[:size], shape.dim, shape.dstate, shape.dt_rank), scratch[size:]
    h, mixed, scratch = scratch[: ROWS * d], scratch[ROWS * d : 2 * ROWS * d], scratch[2 * ROWS * d :]
    gates, scratch = scratch[: 2 * ROWS * d], scratch[2 * ROWS * d :]
    hidden, integers = scratch[: ROWS * padded(shape.hidden)], scratch[ROWS * padded(shape.hidden) :].view(np.int32)
    last_ids, done = integers[:ROWS], integers[ROWS:]
    fill(one, 0, wide, 1)
    fill(y, 0, ROWS * wide, 0)
    fill(z, 0, ROWS * wide, 0)
    for i in range(ROWS):
        last_ids[i] = 0
    for group in range(first, last, ROWS):
        count = min(ROWS, last - group)
        for i in range(count):
            start, n = (group + i) * seqlen, lengths[group + i]
            last_ids[i] = 0
            if not known(ids, start, n, seqlen, shape.n_items):
                fill(y, i * wide, (i + 1) * wide, np.nan)
                unsound[0] = 1
                continue
            last_ids[i] = ids[start + n - 1]
            _scan_row(ids, start, n, shape, tables.u, filter, head, w, transposed, one, x, bins, done, u, scan)
            scanned(scan, 0, wide, y, i * wide)
            gate_input(ids, start, n, shape, tables, filter, z, i * wide)
        queries(y, z, last_ids, shape, head, tables, eps, h, hidden, mixed, gates)
        found = h if shape.gate == NONE else mixed
        for i in range(count):
            for c in range(shape.d_model):
                out[(group + i) * shape.d_model + c] = found[i * d + c]
