"""What a row feeds to its scan: its items through the convolution and the filter.

With V the basis, m its gains and o the gains times the columns' sums (there the convolution's bias goes in every slot):

    inner:  bins = m * (V^T conv(p)) + o * conv_bias, then u = V bins
    input:  bins = m * (V^T p), then u = conv(V bins) + conv_bias
    none:   u = conv(p) + conv_bias

before SiLU. The products are those of `symmetry_kernels.py`; the fold and, in its place, V bins [positions, E] stay in
the second-level cache. V bins is made when the scan comes to it: a row whose states are all forgotten needs no more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiler import inline, part
from .simd import LANES, at, full, load, store
from .symmetry_kernels import GROUP, contract, expand, mixed

NONE, INNER, INPUT = range(3)  # where the filter sits


class Filter(NamedTuple):
    """Of each spectrum; empty where the model has none. The first four are those of `symmetry.Symmetry`."""

    basis: np.ndarray  # [spectra, orbits, columns]
    counts: np.ndarray  # int64 [spectra, 2]
    positions: np.ndarray  # int64 [spectra, slots]
    slots: np.ndarray  # int64 [spectra, max_len]
    gain: np.ndarray  # [spectra, columns]
    offset: np.ndarray  # [spectra, columns]
    last: np.ndarray  # [max_len, max_len]


class Spectrum(NamedTuple):
    """Where a row's is in `Filter`, and its sizes."""

    basis: int
    columns: int
    positions: int
    slots: int
    gain: int
    classes: int
    orbits: int


@part
def spectrum_of(n, shape, filter):
    """Of a row of length n; nothing but zeros where there is no filter."""
    i = n - 1 if shape.valid else 0
    classes, orbits = 0, 0
    if shape.placement != NONE:
        classes, orbits = filter.counts[2 * i], filter.counts[2 * i + 1]
    return Spectrum(
        i * shape.orbits * shape.columns,
        shape.columns,
        i * shape.slots,
        i * shape.max_len,
        i * shape.columns,
        classes,
        orbits,
    )


@inline
def _convolved_item(ids, start, t, n, table, taps, width, wide, c):
    """sum_j taps[j] x[t - j] of one tile of channels, with x[t] = table[ids[start + t]] for t in 0..n - 1, else 0."""
    value = full(table, 0.0)
    for j in range(max(0, t - n + 1), min(width, t + 1)):
        value = value + load(taps, j * wide + c) * load(table, ids[start + t - j] * wide + c)
    return value


@part
def _fold_items(ids, start, n, table, taps, width, wide, from_, to, positions, first, classes, orbits, x):
    """The fold of the convolved items to x; the position in each slot from positions[first:]."""
    for t in range(orbits):
        slot = t * classes
        for c in range(from_, to, LANES):
            b = d = e = full(x, 0.0)
            a = _convolved_item(ids, start, positions[first + slot], n, table, taps, width, wide, c)
            if classes > 1:
                b = _convolved_item(ids, start, positions[first + slot + 1], n, table, taps, width, wide, c)
            if classes > 2:
                d = _convolved_item(ids, start, positions[first + slot + 2], n, table, taps, width, wide, c)
                e = _convolved_item(ids, start, positions[first + slot + 3], n, table, taps, width, wide, c)
            a, b, d, e = mixed(a, b, d, e, classes)
            store(x, t * wide + c, a)
            if classes > 1:
                store(x, (orbits + t) * wide + c, b)
            if classes > 2:
                store(x, (2 * orbits + t) * wide + c, d)
                store(x, (3 * orbits + t) * wide + c, e)


@part
def _gain(bins, columns, gain, offset, start, bias, with_offset, from_, to):
    """bins * m [+ o * bias], in place."""
    for r in range(columns):
        m, o = gain[start + r], offset[start + r] if with_offset else 0
        for c in range(from_, to, LANES):
            place = c * columns + r * LANES
            value = m * load(bins, place)
            if with_offset:
                value = value + o * load(bias, c)
            store(bins, place, value)


@inline
def transform(ids, start, n, shape, table, filter, spectrum, head, one, wide, from_, to, x, bins):
    """A row's bins; x is overwritten. `one` [E] are ones, the taps of no convolution.

    Here and below of the channels `from_` to `to`; those of others are left alone.
    """
    inner = shape.placement == INNER
    taps, width = (head.taps, shape.width) if inner else (one, 1)
    orbits = min(spectrum.orbits, n + width - 1)  # an orbit's first position is the smallest
    _fold_items(
        ids, start, n, table, taps, width, wide, from_, to, filter.positions, spectrum.positions, spectrum.classes,
        orbits, x,
    )  # fmt: skip
    contract(filter.basis, spectrum.basis, spectrum.columns, spectrum.classes, x, orbits, wide, from_, to, bins)
    _gain(bins, spectrum.columns, filter.gain, filter.offset, spectrum.gain, head.conv_bias, inner, from_, to)


@inline
def _expand_for(slot, basis, positions, spectrum, bins, wide, from_, to, x, done):
    """x holds V bins at the slot's position; `done` tells of each group of slots whether it does."""
    group = slot // GROUP
    if not at(done, group):
        done[group] = 1
        expand(
            basis, spectrum.basis, spectrum.columns, spectrum.classes, bins, positions, spectrum.positions, group,
            spectrum.orbits, wide, from_, to, x, 0,
        )  # fmt: skip


@part
def _filtered(t, step, rows, basis, positions, slots, spectrum, bins, wide, from_, to, x, done, u):
    """u [rows, E] = V bins at `rows` positions, the first at t and each `step` before the last one."""
    for i in range(rows):
        p = t - i * step
        _expand_for(slots[spectrum.slots + p], basis, positions, spectrum, bins, wide, from_, to, x, done)
        for c in range(from_, to, LANES):
            store(u, i * wide + c, load(x, p * wide + c))


@part
def _filtered_convolved(
    t, step, rows, basis, positions, slots, spectrum, taps, bias, width, bins, wide, from_, to, x, done, u
):  # fmt: skip
    """u [rows, E] = conv(V bins) + bias at the same."""
    for i in range(rows):
        p = t - i * step
        for j in range(min(width, p + 1)):
            _expand_for(slots[spectrum.slots + p - j], basis, positions, spectrum, bins, wide, from_, to, x, done)
        for c in range(from_, to, LANES):
            value = load(bias, c)
            for j in range(min(width, p + 1)):
                value = value + load(taps, j * wide + c) * load(x, (p - j) * wide + c)
            store(u, i * wide + c, value)


@part
def _convolved(ids, start, n, t, step, rows, table, taps, bias, width, wide, from_, to, u):
    """u [rows, E] = conv(p) + bias at the same."""
    for i in range(rows):
        for c in range(from_, to, LANES):
            value = _convolved_item(ids, start, t - i * step, n, table, taps, width, wide, c)
            store(u, i * wide + c, load(bias, c) + value)


@inline
def read_block(ids, start, n, t, rows, shape, table, filter, spectrum, head, bins, wide, from_, to, x, done, u):
    """u [rows, E] at `rows` positions, the first at t and each `stride` before the last one."""
    if shape.placement == INNER:
        _filtered(
            t, shape.stride, rows, filter.basis, filter.positions, filter.slots, spectrum, bins, wide, from_, to, x,
            done, u,
        )  # fmt: skip
    elif shape.placement == INPUT:
        _filtered_convolved(
            t, shape.stride, rows, filter.basis, filter.positions, filter.slots, spectrum, head.taps, head.conv_bias,
            shape.width, bins, wide, from_, to, x, done, u,
        )  # fmt: skip
    else:
        _convolved(
            ids, start, n, t, shape.stride, rows, table, head.taps, head.conv_bias, shape.width, wide, from_, to, u
        )  # fmt: skip
