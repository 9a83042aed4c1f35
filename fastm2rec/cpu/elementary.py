"""Elementary functions of `Lanes`: exponentials, quotients, logistic, softplus, GELU, each with its error.

Only multiplications and additions may be fused: the rounding in `exp2` depends on the order of the rest. NaN stays NaN
through every function here.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import overload, register_jitable

from . import avx512
from .simd import LANES, intrinsic, load, splat, store, where_less


@intrinsic
def _add_to_exponent(typingctx, x, rounded):
    """x * 2^k, k being the integer in the low bits of `rounded`'s mantissa."""
    mantissa = 23 if x.dtype == types.float32 else 52

    def codegen(context, builder, signature, arguments):
        integers = ir.VectorType(ir.IntType(x.dtype.bitwidth), x.count)
        bits, k = (builder.bitcast(argument, integers) for argument in arguments)
        shift = ir.Constant(integers, [mantissa] * x.count)
        return builder.bitcast(builder.add(bits, builder.shl(k, shift)), arguments[0].type)

    return x(x, x), codegen


# Between these exponentials are right. Above and below they take these values, or with AVX-512 go on to infinity and 0.
# The lower bound leaves room for factors: a product that is not a normal number costs 100 cycles on some processors.
_LOW = {types.float32: -100.0, types.float64: -900.0}
_HIGH = {types.float32: 126.0, types.float64: 1000.0}
# Adding this leaves no bits for a fraction.
_ROUND = {types.float32: 1.5 * 2.0**23, types.float64: 1.5 * 2.0**52}
# 2^f for |f| <= 1/2: a minimax polynomial, 7.5e-8 relative, or Taylor's, 4e-18. Highest power first.
_EXP2 = {
    types.float32: (1.327646679e-03, 9.675541293e-03, 5.550713290e-02, 2.402211972e-01, 6.931469671e-01, 1.000000072),
    types.float64: tuple(math.log(2) ** k / math.factorial(k) for k in range(13, -1, -1)),
}
# The same for 0 <= f <= 1: of float32's coefficients those whose rounded sums are closest, 1.4e-7 and on average 0.
_EXP2_OF_FRACTION = (1.8775914e-03, 8.989336e-03, 5.5826463e-02, 2.4015361e-01, 6.9315296e-01, 9.9999994e-01)
# As the first, with a constant of exactly 1: 4e-9, and less towards 0.
_DECAY = {
    types.float32: (
        1.533757966e-04, 1.339036662e-03, 9.618442412e-03, 5.550358353e-02, 2.402264853e-01, 6.931471876e-01, 1.0,
    ),
    types.float64: _EXP2[types.float64],
}  # fmt: skip
# log(1 + e) / e for 0 <= e <= 1, 3e-8 relative.
_LOG1P = (
    5.232623981e-03, -2.950495713e-02, 7.822549322e-02, -1.366320689e-01, 1.910598847e-01, -2.484297754e-01,
    3.331909622e-01, -4.999949311e-01, 9.999999699e-01,
)  # fmt: skip
# atanh(w) / w in powers of w^2 for |w| <= 1/3: Taylor's, 1e-18.
_ATANH = tuple(1 / (2 * k + 1) for k in range(17, -1, -1))
# exp(x^2) erfc(x) / t in powers of t = 1 / (1 + x / 2) for 0 <= x <= 10: 2.2e-8 relative.
_ERFCX = (
    1.353464931e-02, -1.296140486e-01, 4.428111344e-01, -6.870457980e-01, 4.341518800e-01, -1.045284806e-01,
    2.274455204e-01, 2.382882295e-01, 2.828940154e-01, 2.820628826e-01,
)  # fmt: skip
LOG2_E = math.log2(math.e)


# A factor 2^x below these is nothing: thousands of such terms are less than a rounding of one that remembers.
_FORGOTTEN = {types.float32: -40.0, types.float64: -72.0}


def forgotten(x):
    """Is 2^x next to nothing?"""
    raise NotImplementedError("for numba")


@overload(forgotten, inline="always")
def _(x):
    bound = _FORGOTTEN[x]
    return lambda x: x < bound


@intrinsic
def _polynomial(typingctx, x, coefficients):
    """Horner's scheme; the coefficients are a tuple of numbers, highest power first."""

    def codegen(context, builder, signature, arguments):
        first, *rest = (
            splat(context, builder, value, types.float64, x) for value in cgutils.unpack_tuple(builder, arguments[1])
        )
        value = first
        for coefficient in rest:
            value = builder.fmul(value, arguments[0], flags=("contract",))
            value = builder.fadd(value, coefficient, flags=("contract",))
        return value

    return x(x, coefficients), codegen


def exp2(x):
    """2^x."""
    raise NotImplementedError("for numba")


def _power(dtype, coefficients):
    low, round_ = _LOW[dtype], _ROUND[dtype]

    def compiled(x):
        x = where_less(x, low, low, x)
        rounded = x + round_
        return _add_to_exponent(_polynomial(x - (rounded - round_), coefficients), rounded)

    return compiled


@overload(exp2, inline="always")
def _(x):
    if avx512.AVAILABLE and x.dtype == types.float32:
        return lambda x: avx512.scaled(_polynomial(avx512.fraction(x), _EXP2_OF_FRACTION), x)
    return _power(x.dtype, _EXP2[x.dtype])


def decay(x):
    """2^x, closer, and the closer the nearer it is to 1: for factors of which thousands are multiplied."""
    raise NotImplementedError("for numba")


@overload(decay, inline="always")
def _(x):
    coefficients = _DECAY[x.dtype]
    if not (avx512.AVAILABLE and x.dtype == types.float32):
        return _power(x.dtype, coefficients)

    def compiled(x):
        rest = avx512.from_nearest(x)
        return avx512.scaled(_polynomial(rest, coefficients), x - rest)

    return compiled


def log1p(x):
    """log(1 + x) for 0 <= x <= 1."""
    raise NotImplementedError("for numba")


@overload(log1p, inline="always")
def _(x):
    if x.dtype == types.float32:
        return lambda x: x * _polynomial(x, _LOG1P)

    def compiled(x):
        w = x / (x + 2.0)
        return 2.0 * w * _polynomial(w * w, _ATANH)

    return compiled


def reciprocal(x):
    """1 / x for x that are normal numbers; 6e-8 relative."""
    raise NotImplementedError("for numba")


@overload(reciprocal, inline="always")
def _(x):
    if not (avx512.AVAILABLE and x.dtype == types.float32):
        return lambda x: 1.0 / x

    def compiled(x):
        rough = avx512.rough_reciprocal(x)
        return rough + rough * (1.0 - x * rough)

    return compiled


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    raise NotImplementedError("for numba")


@overload(sigmoid, inline="always")
def _(x):
    low = -_HIGH[x.dtype]

    def compiled(x):
        y = x * LOG2_E
        return reciprocal(1.0 + exp2(0.0 - where_less(y, low, low, y)))

    return compiled


@register_jitable
def softplus(x):
    """log(1 + exp(x)), and its derivative."""
    small = exp2(where_less(x, 0.0, x, 0.0 - x) * LOG2_E)
    return where_less(x, 0.0, 0.0, x) + log1p(small), where_less(x, 0.0, small, 1.0) * reciprocal(1.0 + small)


@register_jitable
def _erfc(x):
    """For x >= 0, in float32; and exp(-x^2)."""
    t, power = reciprocal(1.0 + 0.5 * x), exp2((0.0 - LOG2_E) * x * x)
    return power * t * _polynomial(t, _ERFCX), power


@register_jitable
def _normal(x):
    """Phi(x), the normal distribution's, in float32; and exp(-x^2 / 2)."""
    tail, power = _erfc(math.sqrt(0.5) * where_less(x, 0.0, 0.0 - x, x))
    return where_less(x, 0.0, 0.5 * tail, 1.0 - 0.5 * tail), power


def gelu(x, size):
    """x[:size] * Phi(x[:size]), in place; Phi is the normal distribution's."""
    raise NotImplementedError("for numba")


@overload(gelu)
def _(x, size):
    if x.dtype == types.float64:

        def exact(x, size):
            for i in range(size):
                x[i] *= 0.5 * math.erfc(-math.sqrt(0.5) * x[i])

        return exact

    def compiled(x, size):
        for c in range(0, size, LANES):
            v = load(x, c)
            phi, _ = _normal(v)
            store(x, c, v * phi)

    return compiled


_DENSITY = 1 / math.sqrt(2 * math.pi)


def gelu_slope(x, slope, start, stop):
    """`gelu` of x[start:stop], in place, and its derivative to the same places of `slope`."""
    raise NotImplementedError("for numba")


@overload(gelu_slope)
def _(x, slope, start, stop):
    if x.dtype == types.float64:

        def exact(x, slope, start, stop):
            for i in range(start, stop):
                v = x[i]
                phi = 0.5 * math.erfc(-math.sqrt(0.5) * v)
                x[i] = v * phi
                slope[i] = phi + v * _DENSITY * math.exp(-0.5 * v * v)

        return exact

    def compiled(x, slope, start, stop):
        for c in range(start, stop, LANES):
            v = load(x, c)
            phi, power = _normal(v)
            store(x, c, v * phi)
            store(slope, c, phi + v * _DENSITY * power)

    return compiled
