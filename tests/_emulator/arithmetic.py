"""What an instruction computes from its operands, thread by thread: one function for each opcode.

Approximate instructions (ex2.approx, div.full) give the exact result, rounded; a GPU's is off by up to two units in the
last place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .program import EmulationError

Array = Any  # of numpy, or a scalar of numpy
RAW = {
    1: np.dtype(np.bool_),
    8: np.dtype(np.uint8),
    16: np.dtype(np.uint16),
    32: np.dtype(np.uint32),
    64: np.dtype(np.uint64),
}


@dataclass(frozen=True)
class Type:
    """A PTX type: its width, and how bit patterns become values and values bit patterns."""

    bits: int
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]


@dataclass(frozen=True)
class Operation:
    """`function` of values of types `inputs` gives one of type `output`."""

    inputs: tuple[Type, ...]
    output: Type
    function: Callable[..., Array]


def bf16_values(bits: Array) -> Array:
    """float32 from patterns of bfloat16."""
    return np.left_shift(bits.astype(np.uint32), np.uint32(16)).view(np.float32)


def bf16_bits(values: Array) -> Array:
    """Patterns of bfloat16, to nearest, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def tf32_values(bits: Array) -> Array:
    """float32 as tensor cores read it: without the last 13 bits."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _plain(name: str, bits: int) -> Type:
    dtype = np.dtype(name)
    return Type(
        bits, lambda raw: raw.view(dtype), lambda value: np.asarray(value).astype(dtype, copy=False).view(RAW[bits])
    )


def _pair(one: Type) -> Type:
    """Two in one register, side by side in a last axis."""
    half, whole = RAW[one.bits], RAW[2 * one.bits]

    def decode(raw: Array) -> Array:
        return one.decode(np.ascontiguousarray(raw)[..., None].view(half))

    def encode(value: Array) -> Array:
        return np.ascontiguousarray(one.encode(value)).view(whole)[..., 0]

    return Type(2 * one.bits, decode, encode)


TYPES = {
    "pred": Type(1, lambda raw: raw, lambda value: np.asarray(value, np.bool_)),
    "bf16": Type(16, bf16_values, bf16_bits),
    "tf32": Type(32, lambda raw: raw.view(np.float32), lambda value: np.asarray(value, np.float32).view(np.uint32)),
    "f16": _plain("f2", 16), "f32": _plain("f4", 32), "f64": _plain("f8", 64),
    **{
        f"{kind}{bits}": _plain(f"{'i' if kind == 's' else 'u'}{bits // 8}", bits)
        for kind in "sub" for bits in (8, 16, 32, 64)
    },
}  # fmt: skip
TYPES |= {f"{name}x2": _pair(TYPES[name]) for name in ("bf16", "f16", "f32")}


def _shift_left(a: Array, by: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Array, by: Array) -> Array:
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def _bits_of(a: Array, first: Array, count: Array) -> Array:
    first, count = first.astype(np.int64), count.astype(np.int64)
    part = (a.astype(np.int64) >> first) & ((np.int64(1) << count) - 1)
    if a.dtype.kind == "i":
        sign = np.int64(1) << (count - 1)
        part = (part ^ sign) - sign
    return part


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast(a, b, selector).shape, np.uint64)
    for i in range(4):
        chosen = (selector >> np.uint32(4 * i)).astype(np.uint64)
        byte = both >> (chosen & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = np.where(byte >> np.uint64(7), np.uint64(0xFF), np.uint64(0))
        out |= np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return out


def _quotient(a: Array, b: Array) -> Array:
    whole = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.where((a < 0) != (b < 0), -whole, whole)


def _fused(a: Array, b: Array, c: Array) -> Array:
    # The product of two float32 is exact in float64.
    return a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)


def _wide(function: Callable[..., Array]) -> Callable[..., Array]:
    """Operands in twice their width first."""

    def apply(a: Array, b: Array, *c: Array) -> Array:
        twice = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return function(a.astype(twice), b.astype(twice), *c)

    return apply


_SAME: dict[str, tuple[int, Callable[..., Array]]] = {  # operands and result of one type: how many, and the function
    "add": (2, np.add), "sub": (2, np.subtract), "mul": (2, np.multiply), "mad": (3, lambda a, b, c: a * b + c),
    "abs": (1, np.abs), "neg": (1, np.negative), "and": (2, np.bitwise_and), "or": (2, np.bitwise_or),
    "xor": (2, np.bitwise_xor), "not": (1, np.invert), "mov": (1, lambda a: a), "ex2": (1, np.exp2),
    "lg2": (1, np.log2), "rcp": (1, lambda a: 1 / a), "sqrt": (1, np.sqrt), "rsqrt": (1, lambda a: 1 / np.sqrt(a)),
    "tanh": (1, np.tanh), "fma": (3, _fused), "prmt": (3, _permuted),
}  # fmt: skip
_COMPARED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": lambda a, b: (a != b) & (a == a) & (b == b), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip


@cache
def operation(opcode: str) -> Operation:
    """What an opcode computes.

    Raises:
        EmulationError: it is not known.
    """
    name, *parts = opcode.split(".")
    types = [TYPES[part] for part in parts if part in TYPES]
    found = _operation(name, parts, types) if types else None
    if found is None:
        raise EmulationError(f"unknown instruction {opcode!r}")
    if "ftz" in parts:
        return Operation(found.inputs, found.output, _flushing(found.function))
    return found


def _operation(name: str, parts: list[str], types: list[Type]) -> Operation | None:
    of = types[-1]
    kind = "f" if "f" in parts[-1] else parts[-1][0]
    if name == "cvt":
        return _conversion(parts)
    if len(types) > 1:
        return None
    if name == "setp" and parts[0] in _COMPARED and len(parts) == 2:
        return Operation((of, of), TYPES["pred"], _COMPARED[parts[0]])
    if name == "selp":
        return Operation((of, of, TYPES["pred"]), of, lambda a, b, p: np.where(p, a, b))
    if name in ("min", "max"):
        quiet, strict = (np.fmin, np.minimum) if name == "min" else (np.fmax, np.maximum)
        return Operation((of, of), of, strict if kind != "f" or "NaN" in parts else quiet)
    if name in ("shl", "shr"):
        return Operation((of, TYPES["u32"]), of, _shift_left if name == "shl" else _shift_right)
    if name == "bfe":
        return Operation((of, TYPES["u32"], TYPES["u32"]), of, _bits_of)
    if name == "div":
        return Operation((of, of), of, np.divide if kind == "f" else _quotient)
    if name == "rem":
        return Operation((of, of), of, lambda a, b: a - _quotient(a, b) * b)
    if "wide" in parts:
        twice = TYPES[f"{kind}{2 * of.bits}"]
        return Operation((of, of, twice)[: _SAME[name][0]], twice, _wide(_SAME[name][1]))
    if name == "mul" and "hi" in parts and of.bits == 32:
        return Operation((of, of), of, lambda a, b: _wide(np.multiply)(a, b) >> 32)
    if name in _SAME and "hi" not in parts and "sat" not in parts:
        return Operation((of,) * _SAME[name][0], of, _SAME[name][1])
    return None


def _conversion(parts: list[str]) -> Operation | None:
    to, of = parts[-2:]
    rounding = parts[0]
    if to == "tf32":
        if rounding != "rna":
            return None
        # To nearest, ties away from zero.
        return Operation((TYPES["b32"],), TYPES["b32"], lambda a: (a + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    if to.endswith("x2"):  # the first operand goes to the upper half
        return Operation((TYPES[of], TYPES[of]), TYPES[to], lambda a, b: np.stack(np.broadcast_arrays(b, a), axis=-1))
    if "f" in of and "f" not in to:
        rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}.get(rounding)
        info = np.iinfo(f"{'i' if to[0] == 's' else 'u'}{TYPES[to].bits // 8}")
        if rounded is None or TYPES[to].bits > 32:
            return None
        return Operation(
            (TYPES[of],), TYPES[to], lambda a: np.clip(np.nan_to_num(rounded(a.astype(np.float64))), info.min, info.max)
        )
    return Operation((TYPES[of],), TYPES[to], lambda a: a) if "sat" not in parts else None


def _flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    """Denormal float32 operands and results are zero."""

    def flush(a: Array) -> Array:
        a = np.asarray(a)
        return (
            a
            if a.dtype.kind != "f"
            else np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)
        )

    return lambda *operands: flush(function(*(flush(operand) for operand in operands)))
