"""Matrix products whose sums stay in registers: what a loss over the whole catalogue spends its time on.

`products(rows, columns)` adds up `rows` x `columns` sums at once, each term of `a` being read for all columns and each
of `b` for all rows. `multiply` covers a matrix with such tiles. `b` is read along its rows: `transpose` makes it of one
that lies the other way.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .compiler import part
from .simd import HALF, LANES, address, intrinsic

# With 32 registers 6 x 4 of them are sums, with 16 there are 6 x 2; the others hold b and what is read of a.
ROWS = 6
COLUMNS = 2 * LANES if LANES == 32 else LANES


@functools.cache
def products(rows: int, columns: int) -> Any:
    """The intrinsic whose tile has so many rows and columns, these a multiple of HALF.

    The sum over k < depth of a[from_ + i a_row + k a_step] b[at + k b_step + j] goes to out[to + i out_row + j], or, if
    `more`, is added to it when it is complete: several shorter sums lose less than one long one.
    """
    vectors = columns // HALF

    @intrinsic
    def tile(typingctx, a, from_, a_row, a_step, b, at, b_step, depth, out, to, out_row, more):
        def codegen(context, builder, signature, arguments):
            a, from_, a_row, a_step, b, at, b_step, depth, out, to, out_row, more = arguments
            kinds = signature.args
            vector = ir.VectorType(context.get_value_type(kinds[0].dtype), HALF)
            word = ir.Constant(ir.VectorType(ir.IntType(32), HALF), [0] * HALF)

            def place(kind, array, start, i=None, row=None, j=0):
                index = start if i is None else builder.add(start, builder.mul(ir.Constant(start.type, i), row))
                found = address(context, builder, kind, array, builder.add(index, ir.Constant(start.type, j * HALF)))
                return builder.bitcast(found, vector.as_pointer())

            def aligned(instruction):
                instruction.align = kinds[0].dtype.bitwidth // 8
                return instruction

            sums = [[cgutils.alloca_once(builder, vector) for _ in range(vectors)] for _ in range(rows)]
            zero = ir.Constant(vector, [0.0] * HALF)
            for i in range(rows):
                for j in range(vectors):
                    builder.store(zero, sums[i][j])
            with cgutils.for_range(builder, depth) as loop:
                along_a = builder.add(from_, builder.mul(loop.index, a_step))
                along_b = builder.add(at, builder.mul(loop.index, b_step))
                right = [aligned(builder.load(place(kinds[4], b, along_b, j=j))) for j in range(vectors)]
                for i in range(rows):
                    index = builder.add(along_a, builder.mul(ir.Constant(along_a.type, i), a_row))
                    one = builder.load(address(context, builder, kinds[0], a, index))
                    left = builder.insert_element(
                        ir.Constant(vector, ir.Undefined), one, ir.Constant(ir.IntType(32), 0)
                    )
                    left = builder.shuffle_vector(left, left, word)
                    for j in range(vectors):
                        term = builder.fmul(left, right[j], flags=("contract",))
                        builder.store(builder.fadd(builder.load(sums[i][j]), term, flags=("contract",)), sums[i][j])
            with builder.if_then(more):
                for i in range(rows):
                    for j in range(vectors):
                        before = aligned(builder.load(place(kinds[8], out, to, i, out_row, j)))
                        builder.store(builder.fadd(before, builder.load(sums[i][j])), sums[i][j])
            for i in range(rows):
                for j in range(vectors):
                    aligned(builder.store(builder.load(sums[i][j]), place(kinds[8], out, to, i, out_row, j)))

        size = types.intp
        signature = types.void(a, size, size, size, b, size, size, size, out, size, size, types.boolean)
        return signature, codegen

    return tile


def _covering(columns: int) -> Any:
    """What covers so many columns of a product, and any number of its rows."""
    tile, four, two, row = (products(rows, columns) for rows in (ROWS, 4, 2, 1))

    @part
    def cover(a, from_, a_row, a_step, rows, b, at, b_step, depth, out, to, out_row, more):
        i = 0
        while i + ROWS <= rows:
            tile(a, from_ + i * a_row, a_row, a_step, b, at, b_step, depth, out, to + i * out_row, out_row, more)
            i += ROWS
        if i + 4 <= rows:
            four(a, from_ + i * a_row, a_row, a_step, b, at, b_step, depth, out, to + i * out_row, out_row, more)
            i += 4
        if i + 2 <= rows:
            two(a, from_ + i * a_row, a_row, a_step, b, at, b_step, depth, out, to + i * out_row, out_row, more)
            i += 2
        if i < rows:
            row(a, from_ + i * a_row, a_row, a_step, b, at, b_step, depth, out, to + i * out_row, out_row, more)

    return cover


_wide, _narrow = _covering(COLUMNS), _covering(LANES)


@part
def multiply(a, from_, a_row, a_step, rows, b, at, b_step, columns, depth, out, to, out_row, more):
    """out [rows, columns] = a [rows, depth] b [depth, columns], or that much more; columns a multiple of LANES.

    a's rows are `a_row` elements apart and its columns `a_step`, the rows of b and of out `b_step` and `out_row`.
    """
    wide = columns // COLUMNS * COLUMNS
    for j in range(0, wide, COLUMNS):
        _wide(a, from_, a_row, a_step, rows, b, at + j, b_step, depth, out, to + j, out_row, more)
    for j in range(wide, columns, LANES):
        _narrow(a, from_, a_row, a_step, rows, b, at + j, b_step, depth, out, to + j, out_row, more)


@intrinsic
def _transpose_block(typingctx, x, start, x_row, out, to, out_row):
    """HALF x HALF numbers, those that are 2^k rows apart changing places in step k."""

    def codegen(context, builder, signature, arguments):
        x, start, x_row, out, to, out_row = arguments
        kinds = signature.args
        vector = ir.VectorType(context.get_value_type(kinds[0].dtype), HALF)
        size = kinds[0].dtype.bitwidth // 8

        def place(kind, array, start, row, i):
            index = builder.add(start, builder.mul(ir.Constant(start.type, i), row))
            return builder.bitcast(address(context, builder, kind, array, index), vector.as_pointer())

        def picked(a, b, places):
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), HALF), places))

        rows = [builder.load(place(kinds[0], x, start, x_row, i)) for i in range(HALF)]
        for row in rows:
            row.align = size
        step = 1
        while step < HALF:
            for i in range(HALF):
                if not i & step:
                    a, b = rows[i], rows[i + step]
                    rows[i] = picked(a, b, [HALF + j - step if j & step else j for j in range(HALF)])
                    rows[i + step] = picked(a, b, [HALF + j if j & step else j + step for j in range(HALF)])
            step *= 2
        for i, row in enumerate(rows):
            builder.store(row, place(kinds[3], out, to, out_row, i)).align = size

    size = types.intp
    return types.void(x, size, size, out, size, size), codegen


@part
def transpose(x, rows, columns, out, to):
    """x [rows, columns] as [columns, rows] to out[to:]; both are multiples of HALF."""
    for i in range(0, rows, HALF):
        for j in range(0, columns, HALF):
            _transpose_block(x, i * columns + j, columns, out, to + j * rows + i, rows)
