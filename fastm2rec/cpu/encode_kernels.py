"""Item ids to query vectors, row by row: what `reference/encode_last.py` computes, in float32 or float64.

A row's convolved items [L, E] stay in the second-level cache. With V the basis, m its gains and o the gains times the
columns' sums (where the convolution's bias goes, in every slot):

    inner:  bins = m * (V^T conv(p)) + o * conv_bias, then, eight positions at a time, u = silu(V bins)
    input:  p = V (m * (V^T p)) for the whole row first, then u = silu(conv(p) + conv_bias)

The scan is that of `parts.py`. What follows it, at the last position alone, is done for ROWS rows of the batch at once.
A row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiler import entry, part
from .parts import (
    ROWS,
    accumulate_products,
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
from .simd import LANES, at, full, gelu, load, sigmoid, store, total

NONE, INNER, INPUT = range(3)  # where the filter sits
LINEAR, CONSTANT, CONTEXT = range(1, 4)  # the gate; NONE has none
BLOCK = 128  # positions whose products are summed before they are added to the others: long sums lose less


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


class Filter(NamedTuple):
    """Of each spectrum; empty where the model has none."""

    basis: np.ndarray  # [spectra, max_len, columns]
    gain: np.ndarray  # [spectra, columns]
    offset: np.ndarray  # [spectra, columns]
    last: np.ndarray  # [max_len, max_len]


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
    slots = shape.max_len + ROWS
    filters = (slots if shape.placement == INPUT else 0) + shape.columns
    scan = scan_size(shape.dim, shape.dstate, shape.dt_rank)
    return (slots + filters + 3 * ROWS) * wide + scan + ROWS * (4 * d + hidden)


@part
def _convolve(x, n, stop, taps, bias, with_bias, width, wide, out):
    """out[t] = sum_j taps[j] x[t - j] [+ bias] for t < stop; x [n, E] and zeros behind it."""
    for t in range(stop):
        for c in range(0, wide, LANES):
            value = load(bias, c) if with_bias else full(out, 0.0)
            for j in range(max(0, t - n + 1), min(width, t + 1)):
                value = value + load(taps, j * wide + c) * load(x, (t - j) * wide + c)
            store(out, t * wide + c, value)


@part
def _convolve_items(ids, start, n, stop, table, taps, bias, with_bias, width, wide, out):
    """The same of x[t] = table[ids[start + t]]."""
    for t in range(stop):
        for c in range(0, wide, LANES):
            value = load(bias, c) if with_bias else full(out, 0.0)
            for j in range(max(0, t - n + 1), min(width, t + 1)):
                value = value + load(taps, j * wide + c) * load(table, ids[start + t - j] * wide + c)
            store(out, t * wide + c, value)


@part
def _contract(basis, start, columns, x, stop, wide, bins):
    """bins [columns, E] = V^T x over the first `stop` positions; V from basis[start:]."""
    fill(bins, 0, columns * wide, 0)
    for first in range(0, stop, BLOCK):
        last = min(first + BLOCK, stop)
        for r in range(0, columns, ROWS):
            for c in range(0, wide, LANES):
                a = b = d = e = f = g = h = i = full(x, 0.0)
                for t in range(first, last):
                    value = load(x, t * wide + c)
                    place = start + t * columns + r
                    a = a + at(basis, place) * value
                    b = b + at(basis, place + 1) * value
                    d = d + at(basis, place + 2) * value
                    e = e + at(basis, place + 3) * value
                    f = f + at(basis, place + 4) * value
                    g = g + at(basis, place + 5) * value
                    h = h + at(basis, place + 6) * value
                    i = i + at(basis, place + 7) * value
                accumulate_products(bins, r * wide + c, wide, a, b, d, e, f, g, h, i)


@part
def _expand(basis, start, step, rows, columns, bins, wide, out):
    """out [ROWS, E] = V bins at `rows` positions, the first at basis[start:] and each `step` before the last one."""
    last = rows - 1
    p, q, r, s = start, start - min(1, last) * step, start - min(2, last) * step, start - min(3, last) * step
    t, u, v, w = (
        start - min(4, last) * step, start - min(5, last) * step, start - min(6, last) * step,
        start - min(7, last) * step,
    )  # fmt: skip
    for c in range(0, wide, LANES):
        a = b = d = e = f = g = h = i = full(out, 0.0)
        for k in range(columns):
            value = load(bins, k * wide + c)
            a = a + at(basis, p + k) * value
            b = b + at(basis, q + k) * value
            d = d + at(basis, r + k) * value
            e = e + at(basis, s + k) * value
            f = f + at(basis, t + k) * value
            g = g + at(basis, u + k) * value
            h = h + at(basis, v + k) * value
            i = i + at(basis, w + k) * value
        store(out, c, a)
        store(out, wide + c, b)
        store(out, 2 * wide + c, d)
        store(out, 3 * wide + c, e)
        store(out, 4 * wide + c, f)
        store(out, 5 * wide + c, g)
        store(out, 6 * wide + c, h)
        store(out, 7 * wide + c, i)


@part
def _gained(bins, filter, spectrum, columns, offset, bias, wide):
    """bins * m [+ o * bias], in place."""
    for r in range(columns):
        m = filter.gain[spectrum * columns + r]
        for c in range(0, wide, LANES):
            value = m * load(bins, r * wide + c)
            if offset:
                value = value + filter.offset[spectrum * columns + r] * load(bias, c)
            store(bins, r * wide + c, value)


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
def _queries(y, z, last_ids, shape, head, tables, eps, h, hidden, mixed, gates):
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
def _known(ids, start, length, seqlen, n_items):
    """Is the row sound, so that nothing is read out of bounds?"""
    if length < 1 or length > seqlen:
        return False
    for t in range(start, start + length):  # noqa: SIM110 (numba knows no `all`)
        if ids[t] < 1 or ids[t] > n_items:
            return False
    return True


@entry
def encode(ids, lengths, out, seqlen, shape, tables, filter, head, weights, transposed, eps, scratch, first, last):
    """The queries [batch, d_model] of the rows from `first` to before `last`; NaN where one is not sound."""
    wide, d = padded(shape.dim), padded(shape.d_model)
    columns = shape.columns
    w = as_weights(weights, shape.dim, shape.dstate, shape.dt_rank)
    slots = shape.max_len + ROWS
    x, scratch = scratch[: slots * wide], scratch[slots * wide :]
    filtered, scratch = (
        (scratch[: slots * wide], scratch[slots * wide :]) if shape.placement == INPUT else (scratch[:0], scratch)
    )
    bins, scratch = scratch[: columns * wide], scratch[columns * wide :]
    u, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    y, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    z, scratch = scratch[: ROWS * wide], scratch[ROWS * wide :]
    size = scan_size(shape.dim, shape.dstate, shape.dt_rank)
    scan, scratch = as_scan(scratch[:size], shape.dim, shape.dstate, shape.dt_rank), scratch[size:]
    h, mixed, scratch = scratch[: ROWS * d], scratch[ROWS * d : 2 * ROWS * d], scratch[2 * ROWS * d :]
    gates, hidden = scratch[: 2 * ROWS * d], scratch[2 * ROWS * d :]
    last_ids = np.zeros(ROWS, np.int64)
    fill(y, 0, ROWS * wide, 0)
    fill(z, 0, ROWS * wide, 0)
    for group in range(first, last, ROWS):
        count = min(ROWS, last - group)
        for i in range(count):
            start, n = (group + i) * seqlen, lengths[group + i]
            last_ids[i] = 0
            if not _known(ids, start, n, seqlen, shape.n_items):
                fill(y, i * wide, (i + 1) * wide, np.nan)
                continue
            last_ids[i] = ids[start + n - 1]
            spectrum = n - 1 if shape.valid else 0
            basis = spectrum * shape.max_len * columns
            if shape.placement == INNER:
                stop = n if shape.valid else min(n + shape.width - 1, shape.max_len)
                _convolve_items(
                    ids, start, n, stop, tables.u, head.taps, head.conv_bias, False, shape.width, wide, x
                )  # fmt: skip
                _contract(filter.basis, basis, columns, x, stop, wide, bins)
                _gained(bins, filter, spectrum, columns, True, head.conv_bias, wide)
            elif shape.placement == INPUT:
                for t in range(n):
                    read(tables.u, ids[start + t] * wide, 0, 1, wide, x[t * wide :])
                _contract(filter.basis, basis, columns, x, n, wide, bins)
                _gained(bins, filter, spectrum, columns, False, head.conv_bias, wide)
                for t in range(0, n, ROWS):
                    rows = min(ROWS, n - t)
                    _expand(
                        filter.basis, basis + t * columns, -columns, rows, columns, bins, wide, filtered[t * wide :]
                    )  # fmt: skip
                _convolve(filtered, n, n, head.taps, head.conv_bias, True, shape.width, wide, x)
            else:
                _convolve_items(
                    ids, start, n, n, tables.u, head.taps, head.conv_bias, True, shape.width, wide, x
                )  # fmt: skip

            steps = (n + shape.stride - 1) // shape.stride
            start_scan(scan, wide, shape.dstate)
            for k in range(0, steps, ROWS):
                if not forget(scan, w.A, wide, shape.dstate):
                    break
                rows = min(ROWS, steps - k)
                t = n - 1 - k * shape.stride
                if shape.placement == INNER:
                    _expand(
                        filter.basis, basis + t * columns, shape.stride * columns, rows, columns, bins, wide, u
                    )  # fmt: skip
                else:
                    read(x, t * wide, shape.stride * wide, rows, wide, u)
                silu(u, rows * wide)
                scan_block(u, rows, k == 0, w, transposed, scan, shape.dim, shape.dstate, shape.dt_rank)
            scanned(scan, wide, y, i * wide)

            if shape.placement == INPUT:
                for c in range(0, wide, LANES):
                    value = full(z, 0.0)
                    for t in range(n):
                        weight = at(filter.last, (n - 1) * shape.max_len + t)
                        value = value + weight * load(tables.z, ids[start + t] * wide + c)
                    store(z, i * wide + c, value)
            else:
                read(tables.z, last_ids[i] * wide, 0, 1, wide, z[i * wide :])
        _queries(y, z, last_ids, shape, head, tables, eps, h, hidden, mixed, gates)
        found = h if shape.gate == NONE else mixed
        for i in range(count):
            for c in range(shape.d_model):
                out[(group + i) * shape.d_model + c] = found[i * d + c]
