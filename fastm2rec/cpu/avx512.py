"""Instructions of x86 processors with AVX-512, for `Lanes` of float32: what makes an exponential or a quotient cheap.

Only `elementary.py` calls them, and only where they are `AVAILABLE`. NaN stays NaN.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .simd import FEATURES, intrinsic

AVAILABLE = {"+avx512f", "+avx512dq"} <= FEATURES

_REGISTER = 16  # numbers
_WORD = ir.IntType(32)
_ALL = ir.Constant(ir.IntType(16), -1)  # of a register's numbers
_NEAREST, _DOWN = (ir.Constant(_WORD, how) for how in (0, 1))  # how an instruction rounds
_AS_SET = ir.Constant(_WORD, 4)  # or as the thread does


def _places(start: int, count: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_WORD, count), list(range(start, start + count)))


def _by_registers(name: str, before: tuple[ir.Constant, ...], after: tuple[ir.Constant, ...]) -> Any:
    """Code for LLVM's `name` of each register of its operands; the constants are `before` and `after` its mask."""

    def codegen(context, builder, signature, arguments):
        lanes = context.get_value_type(signature.return_type)
        register = ir.VectorType(lanes.element, _REGISTER)
        whatever = ir.Constant(register, ir.Undefined)  # where the mask is not set
        made = []
        for start in range(0, lanes.count, _REGISTER):
            given = [builder.shuffle_vector(value, value, _places(start, _REGISTER)) for value in arguments]
            given += [*before, whatever, _ALL, *after]
            kind = ir.FunctionType(register, [value.type for value in given])
            function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512.{name}.512")
            made.append(builder.call(function, given))
        while len(made) > 1:
            places = _places(0, 2 * made[0].type.count)
            made = [builder.shuffle_vector(a, b, places) for a, b in zip(made[::2], made[1::2], strict=True)]
        return made[0]

    return codegen


@intrinsic
def fraction(typingctx, x):
    """x - floor(x), which may round to 1; 0 for the infinities."""
    return x(x), _by_registers("mask.reduce.ps", (_DOWN,), (_AS_SET,))


@intrinsic
def from_nearest(typingctx, x):
    """x less the nearest integer; 0 for the infinities."""
    return x(x), _by_registers("mask.reduce.ps", (_NEAREST,), (_AS_SET,))


@intrinsic
def scaled(typingctx, x, y):
    """x * 2^floor(y), 0 or infinity where that is out of range."""
    return x(x, y), _by_registers("mask.scalef.ps", (), (_AS_SET,))


@intrinsic
def rough_reciprocal(typingctx, x):
    """1 / x, 2^-14 relative; 0 for infinity."""
    return x(x), _by_registers("rcp14.ps", (), ())
