"""`Lanes`: several numbers as one value in numba code, and how they are read, written, added up and compared.

LLVM's own vectoriser gives up on a loop over as many arrays as the backward pass has, and cannot keep sums of several
rows in registers. With a vector type the kernels say what they want: `+ - * /` of Lanes with Lanes or with a number,
`load`, `store`, `total`. Exponentials and what is made of them: elementary.py.

Multiplications and additions may be fused, nothing else may be reordered: compensated sums depend on it. NaN stays NaN
through every function here.
"""

from __future__ import annotations

import operator
from typing import Any

import numba.extending
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import lower_builtin, models, register_model, type_callable

# What it decorates is called with other arguments than it is defined with, which type checkers cannot know.
intrinsic: Any = numba.extending.intrinsic

# What the processor has, or what numba was told of it.
_TOLD: str | None = config.CPU_FEATURES  # type: ignore[attr-defined]
FEATURES = frozenset((get_host_cpu_features() if _TOLD is None else _TOLD).split(","))

# Two registers of float32 to a value, so that each instruction has an independent one beside it: on a processor with
# AVX-512 (Zen 4) 10 % less time than one register forward, 20 % less backward.
LANES = 32 if "+avx512f" in FEATURES else 16
HALF = LANES // 2


class Lanes(types.Type):
    def __init__(self, dtype: types.Float, count: int = LANES) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(name=f"Lanes({dtype}, {count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, ir.VectorType(manager.lookup(lanes.dtype).get_value_type(), lanes.count))


def splat(context, builder, value, kind, lanes):
    """`value` of numba type `kind`, a number or Lanes already, as Lanes."""
    if isinstance(kind, Lanes):
        return value
    vector = context.get_value_type(lanes)
    number = context.cast(builder, value, kind, lanes.dtype)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(
        one, one, ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    )


def _common(a, b):
    """The type of `a op b`; None where that is not for us."""
    if isinstance(a, Lanes) and (a == b or isinstance(b, types.Number)):
        return a
    return b if isinstance(b, Lanes) and isinstance(a, types.Number) else None


def _register(python_operator, instruction: str) -> None:
    @type_callable(python_operator)
    def type_of_result(context):
        return _common

    def lower(context, builder, signature, arguments):
        a, b = (
            splat(context, builder, value, kind, signature.return_type)
            for value, kind in zip(arguments, signature.args, strict=True)
        )
        return getattr(builder, instruction)(a, b, flags=("contract",))

    for kinds in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lower_builtin(python_operator, *kinds)(lower)


for _operator, _instruction in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv"),
):  # fmt: skip
    _register(_operator, _instruction)


def address(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@intrinsic
def load(typingctx, array, index):
    """array[index : index + LANES]."""
    lanes = Lanes(array.dtype)

    def codegen(context, builder, signature, arguments):
        vector = context.get_value_type(lanes)
        place = address(context, builder, signature.args[0], *arguments)
        value = builder.load(builder.bitcast(place, vector.as_pointer()))
        value.align = array.dtype.bitwidth // 8
        return value

    return lanes(array, types.intp), codegen


@intrinsic
def load_half(typingctx, array, index):
    """array[index : index + HALF]."""
    lanes = Lanes(array.dtype, HALF)

    def codegen(context, builder, signature, arguments):
        vector = context.get_value_type(lanes)
        place = address(context, builder, signature.args[0], *arguments)
        value = builder.load(builder.bitcast(place, vector.as_pointer()))
        value.align = array.dtype.bitwidth // 8
        return value

    return lanes(array, types.intp), codegen


def _picked(builder, a, b, places):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))


@intrinsic
def folded(typingctx, x):
    """The sum of both halves of the lanes: half as many."""
    half = Lanes(x.dtype, x.count // 2)

    def codegen(context, builder, signature, arguments):
        (value,) = arguments
        low, high = (
            _picked(builder, value, value, list(range(start, start + half.count))) for start in (0, half.count)
        )
        return builder.fadd(low, high, flags=("contract",))

    return half(x), codegen


@intrinsic
def side_by_side(typingctx, x, y):
    """The sums of x's halves, then those of y's: as many lanes as each of them has."""

    def codegen(context, builder, signature, arguments):
        a, b = arguments
        half, count = x.count // 2, x.count
        low = _picked(builder, a, b, [*range(half), *range(count, count + half)])
        high = _picked(builder, a, b, [*range(half, count), *range(count + half, 2 * count)])
        return builder.fadd(low, high, flags=("contract",))

    return x(x, x), codegen


def _totals(width: int) -> Any:
    """f(x, start, out, place): out[place : place + HALF] = the sums of the HALF rows [width] at x[start:]."""

    @intrinsic
    def compiled(typingctx, x, start, out, place):
        lanes = Lanes(x.dtype, HALF)

        def codegen(context, builder, signature, arguments):
            array, start, out, place = arguments
            vector = context.get_value_type(lanes)

            def pointer(kind, array, index):
                return builder.bitcast(address(context, builder, kind, array, index), vector.as_pointer())

            rows = []
            for i in range(width):
                shift = ir.Constant(start.type, i * HALF)
                row = builder.load(pointer(signature.args[0], array, builder.add(start, shift)))
                row.align = x.dtype.bitwidth // 8
                rows.append(row)
            while len(rows) > 1:
                rows = [
                    builder.fadd(*(_picked(builder, a, b, list(range(side, 2 * HALF, 2))) for side in (0, 1)))
                    for a, b in zip(rows[::2], rows[1::2], strict=True)
                ]
            builder.store(rows[0], pointer(signature.args[2], out, place)).align = x.dtype.bitwidth // 8

        return types.void(x, types.intp, out, types.intp), codegen

    return compiled


totals, totals_of_quarters = _totals(HALF), _totals(HALF // 2)


@intrinsic
def store(typingctx, array, index, value):
    """array[index : index + LANES] = value, Lanes or a number."""
    lanes = Lanes(array.dtype)

    def codegen(context, builder, signature, arguments):
        place = address(context, builder, signature.args[0], *arguments[:2])
        kind = signature.args[2]
        vector = splat(context, builder, arguments[2], kind, lanes)
        instruction = builder.store(vector, builder.bitcast(place, vector.type.as_pointer()))
        instruction.align = array.dtype.bitwidth // 8

    return types.void(array, types.intp, value), codegen


@intrinsic
def at(typingctx, array, index):
    """array[index], which is not negative: numba's own indexing asks."""

    def codegen(context, builder, signature, arguments):
        return builder.load(address(context, builder, signature.args[0], *arguments))

    return array.dtype(array, types.intp), codegen


@intrinsic
def put(typingctx, array, index, value):
    """array[index] = value, a number of the array's dtype; the index is not negative."""

    def codegen(context, builder, signature, arguments):
        builder.store(arguments[2], address(context, builder, signature.args[0], *arguments[:2]))

    return types.void(array, types.intp, array.dtype), codegen


@intrinsic
def full(typingctx, array, value):
    """Lanes of the array's dtype, each of them `value`."""
    lanes = Lanes(array.dtype)

    def codegen(context, builder, signature, arguments):
        return splat(context, builder, arguments[1], signature.args[1], lanes)

    return lanes(array, value), codegen


@intrinsic
def where_less(typingctx, x, bound, then, otherwise):
    """`then` where x < bound, else (and where x is NaN) `otherwise`."""

    def codegen(context, builder, signature, arguments):
        value, bound, then, otherwise = (
            splat(context, builder, argument, kind, x) for argument, kind in zip(arguments, signature.args, strict=True)
        )
        return builder.select(builder.fcmp_ordered("<", value, bound), then, otherwise)

    return x(x, bound, then, otherwise), codegen


@intrinsic
def above(typingctx, x, bound):
    """A bit for each lane that is above `bound`, or NaN; the first lane's is the lowest."""

    def codegen(context, builder, signature, arguments):
        value, bound = (
            splat(context, builder, argument, kind, x) for argument, kind in zip(arguments, signature.args, strict=True)
        )
        bits = builder.fcmp_unordered(">", value, bound)
        return builder.zext(builder.bitcast(bits, ir.IntType(x.count)), ir.IntType(64))

    return types.int64(x, bound), codegen


@intrinsic
def lowest_bit(typingctx, bits):
    """The place of the lowest bit that is set; there must be one."""

    def codegen(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(cgutils.bool_t, 1))

    return types.int64(types.int64), codegen


@intrinsic
def bits_set(typingctx, bits):
    """How many bits are set."""

    def codegen(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), codegen


@intrinsic
def widened(typingctx, x):
    """The same lanes in float64."""
    lanes = Lanes(types.float64, x.count)

    def codegen(context, builder, signature, arguments):
        vector = context.get_value_type(lanes)
        return arguments[0] if x == lanes else builder.fpext(arguments[0], vector)

    return lanes(x), codegen


def _mixed(builder, bits):
    """A permutation of 32-bit integers in which every bit of the input changes about half of the output's (murmur3)."""

    def constant(value):
        return ir.Constant(bits.type, [value] * LANES)

    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None)):
        bits = builder.xor(bits, builder.lshr(bits, constant(shift)))
        bits = bits if factor is None else builder.mul(bits, constant(factor))
    return bits


@intrinsic
def dropped(typingctx, array, index, key, threshold, scale):
    """Dropout's factors for array[index : index + LANES]: 0 with a probability of threshold / 2^32, else `scale`.

    Random in the 64 bits of `key` and in the index, and the same whenever these are.
    """
    lanes = Lanes(array.dtype)

    def codegen(context, builder, signature, arguments):
        _, index, key, threshold, scale = arguments
        kinds = signature.args
        word = ir.IntType(32)
        words = ir.VectorType(word, LANES)

        def repeated(value):
            one = builder.insert_element(ir.Constant(words, ir.Undefined), value, ir.Constant(word, 0))
            return builder.shuffle_vector(one, one, ir.Constant(words, [0] * LANES))

        def half(value, shift):
            return repeated(builder.trunc(builder.lshr(value, ir.Constant(value.type, shift)), word))

        bits = builder.add(half(index, 0), ir.Constant(words, list(range(LANES))))
        bits = _mixed(builder, builder.add(bits, half(key, 0)))
        bits = _mixed(builder, builder.xor(bits, builder.add(half(key, 32), half(index, 32))))
        kept = builder.icmp_unsigned(">=", bits, half(threshold, 0))
        scales = splat(context, builder, scale, kinds[4], lanes)
        return builder.select(kept, scales, ir.Constant(scales.type, [0.0] * LANES))

    return lanes(array, types.int64, types.int64, types.int64, scale), codegen


@intrinsic
def least(typingctx, x):
    """The smallest of the lanes."""

    def codegen(context, builder, signature, arguments):
        (value,) = arguments
        width = x.count
        while width > 1:
            width //= 2
            low, high = (_picked(builder, value, value, list(range(start, start + width))) for start in (0, width))
            value = builder.select(builder.fcmp_ordered("<", low, high), low, high)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return x.dtype(x), codegen


@intrinsic
def total(typingctx, x):
    """The sum of the lanes, halves added to halves."""

    def codegen(context, builder, signature, arguments):
        (value,) = arguments
        width = x.count
        while width > 1:
            width //= 2
            low, high = (_picked(builder, value, value, list(range(start, start + width))) for start in (0, width))
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return x.dtype(x), codegen
