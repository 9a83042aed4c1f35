"""One long row on several threads: `encode_kernels.py` for whoever waits for a single answer.

Threads share a batch by its rows. A single row they share in four steps, each of which must wait for the one before:

    u = silu(...)                 tile of channels by tile of channels
    delta, B, C = x_proj(u)       block of positions by block of positions
    step sizes and scan           tile by tile
    query                         one thread

Every number is made by the same operations in the same order as among other rows: the result is the same to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiler import entry, part
from .elementary import sigmoid
from .encode_kernels import Shape, as_last, known, last_size, queries, take_last
from .parts import (
    ROWS,
    as_scan,
    as_weights,
    fill,
    forget,
    padded,
    project,
    project_one,
    scan_channels,
    scan_size,
    scanned,
    start_scan,
    write,
)
from .row_kernels import NONE, read_block, spectrum_of, transform
from .simd import LANES, load, store
from .slices import slices_of
from .symmetry_kernels import GROUP

BLOCKS = 8  # that are worth a slice


class Row(NamedTuple):
    """What the steps hand on; E = padded(dim), and positions come last one first, in blocks of ROWS."""

    x: np.ndarray  # [slots, E], the fold and then V bins
    bins: np.ndarray  # [columns, E]
    u: np.ndarray  # [blocks * ROWS, E]
    projected: np.ndarray  # [blocks * ROWS, padded(dt_rank + dstate)], delta and B
    C: np.ndarray  # [padded(dstate)]
    y: np.ndarray  # [E]


def row_size(shape: Shape, seqlen: int) -> int:
    """Elements of `Row`."""
    wide, columns = padded(shape.dim), padded(shape.dt_rank + shape.dstate)
    positions = (seqlen // shape.stride + 1 + ROWS) * (wide + columns)
    return (shape.slots + shape.columns) * wide + positions + padded(shape.dstate) + wide


@part
def _as_row(flat, shape, steps):
    wide = padded(shape.dim)
    positions = (steps + ROWS - 1) // ROWS * ROWS
    bins = shape.slots * wide
    u = bins + shape.columns * wide
    projected = u + positions * wide
    C = projected + positions * padded(shape.dt_rank + shape.dstate)
    y = C + padded(shape.dstate)
    return Row(flat[:bins], flat[bins:u], flat[u:projected], flat[projected:C], flat[C:y], flat[y : y + wide])


def scratch_size(shape: Shape) -> int:
    """Elements that a thread needs."""
    wide = padded(shape.dim)
    feed = wide + (shape.slots + GROUP - 1) // GROUP
    return max(feed, scan_size(shape.dim, shape.dstate, shape.dt_rank), last_size(shape))


@part
def _feed(first, last, scratch, ids, n, row, unsound, shape, tables, filter, head):
    """u of the tiles from `first` to before `last`. If the row is not sound, `unsound` [1] becomes 1."""
    if not known(ids, 0, n, n, shape.n_items):
        unsound[0] = 1
        return
    wide = padded(shape.dim)
    one, groups = scratch[:wide], (shape.slots + GROUP - 1) // GROUP
    done = scratch[wide : wide + groups].view(np.int32)
    fill(one, 0, wide, 1)
    spectrum = spectrum_of(n, shape, filter)
    steps = (n + shape.stride - 1) // shape.stride
    for c in range(first * LANES, last * LANES, LANES):
        if shape.placement != NONE:
            transform(
                ids, 0, n, shape, tables.u, filter, spectrum, head, one, wide, c, c + LANES, row.x, row.bins
            )  # fmt: skip
            for group in range(done.size):
                done[group] = 0
        for k in range(0, steps, ROWS):
            rows, t, block = min(ROWS, steps - k), n - 1 - k * shape.stride, row.u[k * wide :]
            read_block(
                ids, 0, n, t, rows, shape, tables.u, filter, spectrum, head, row.bins, wide, c, c + LANES, row.x, done,
                block,
            )  # fmt: skip
            for i in range(rows):
                value = load(block, i * wide + c)
                store(block, i * wide + c, value * sigmoid(value))
            for i in range(rows, ROWS):
                store(block, i * wide + c, 0.0)


@part
def _reduce(first, last, scratch, row, unsound, transposed, dim, dstate, dt_rank):
    """Delta and B of the blocks from `first` to before `last`, and C."""
    if unsound[0]:
        return
    wide, columns = padded(dim), padded(dt_rank + dstate)
    for k in range(first * ROWS, last * ROWS, ROWS):
        project(row.u[k * wide :], transposed, dim, columns, row.projected[k * columns :])
    if first == 0:
        project_one(row.u, transposed[dim * columns :], dim, padded(dstate), row.C)


@part
def _scan(first, last, scratch, steps, row, unsound, weights, dim, dstate, dt_rank):
    """y of the tiles from `first` to before `last`."""
    if unsound[0]:
        return
    wide, columns = padded(dim), padded(dt_rank + dstate)
    w, state = as_weights(weights, dim, dstate, dt_rank), as_scan(scratch, dim, dstate, dt_rank)
    for c in range(first * LANES, last * LANES, LANES):
        start_scan(state, c, c + LANES, dstate)
        for k in range(0, steps, ROWS):
            if not forget(state, w, c, c + LANES, dstate):
                break
            scan_channels(
                row.u[k * wide :], min(ROWS, steps - k), k == 0, w, row.projected[k * columns :], row.C, state, wide, c,
                c + LANES, dstate, dt_rank,
            )  # fmt: skip
        scanned(state, c, c + LANES, row.y, 0)


@part
def _answer(first, last, scratch, ids, n, row, out, unsound, shape, tables, filter, head, eps):
    """The query [d_model]; NaN if the row is not sound."""
    if unsound[0]:
        fill(out, 0, shape.d_model, np.nan)
        return
    ends = as_last(scratch, shape)
    write(row.y, 0, padded(shape.dim), ends.y, 0)
    take_last(ids, 0, n, shape, tables, filter, ends, 0)
    queries(ends, shape, head, tables, eps)
    write(ends.h if shape.gate == NONE else ends.mixed, 0, shape.d_model, out, 0)


_in_feed, _in_reduce, _in_scan, _in_answer = (slices_of(step) for step in (_feed, _reduce, _scan, _answer))


@entry
def encode_rows(
    counters, memory, size, threads, row_memory, ids, lengths, out, unsound, seqlen, shape, tables, filter, head,
    weights, transposed, eps,
):  # fmt: skip
    """The queries [batch, d_model], row by row.

    NaN where one is not sound; then `unsound` [1] becomes 1. `memory` is [threads, size], `counters` int64 [9].
    """
    tiles, sizes = padded(shape.dim) // LANES, (shape.dim, shape.dstate, shape.dt_rank)
    failed = counters[8:]
    for b in range(lengths.size):
        n, items = lengths[b], ids[b * seqlen : (b + 1) * seqlen]
        query = out[b * shape.d_model : (b + 1) * shape.d_model]
        for i in range(counters.size):
            counters[i] = 0
        steps = (n + shape.stride - 1) // shape.stride
        row, blocks = _as_row(row_memory, shape, steps), (steps + ROWS - 1) // ROWS
        _in_feed((
            counters[:2], memory, size, tiles, 1, threads, items, n, row, failed, shape, tables, filter, head
        ))  # fmt: skip
        _in_reduce((counters[2:4], memory, size, blocks, BLOCKS, threads, row, failed, transposed, *sizes))
        _in_scan((counters[4:6], memory, size, tiles, 1, threads, steps, row, failed, weights, *sizes))
        _in_answer((
            counters[6:8], memory, size, 1, 1, 1, items, n, row, query, failed, shape, tables, filter, head, eps
        ))  # fmt: skip
        unsound[0] |= failed[0]
