"""Instructions of whole warps on matrices: which element a lane's register holds, and products.

Layouts are those of the PTX manual, "Matrix Fragments" and "Shared Memory Matrix Layout": lane l of a warp is number
l % 4 in group l // 4. Products are summed in float64 and rounded once; a tensor core rounds its sums on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from .arithmetic import TYPES, bf16_values, tf32_values
from .program import EmulationError

_LANE = np.arange(32)
_GROUP, _MEMBER = _LANE // 4, _LANE % 4
_SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes, by a descriptor's upper two bits


@cache
def rows_and_columns(part: str, per: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """[registers, 32, per]: rows and columns of what a warp holds of an operand.

    Args:
        part: "a" of 16 or 8 rows, "b" of 8 columns, or "d", the sums.
        per: elements in a register.
        count: registers.
    """
    register, lane, value = np.meshgrid(np.arange(count), _LANE, np.arange(per), indexing="ij")
    group, member = _GROUP[lane], _MEMBER[lane]
    if part == "d":
        return group + 8 * (register % 4 // 2), 8 * (register // 4) + 2 * member + register % 2
    if part == "a":
        return group + 8 * (register % 2), per * (member + 4 * (register // 2)) + value
    return per * (member + 4 * register) + value, group


def values(registers: np.ndarray, kind: str) -> np.ndarray:
    """[..., per] elements, float32 if not float64, from registers that hold `kind`."""
    if kind == "tf32":
        return tf32_values(registers)[..., None]
    if kind in ("f32", "f64"):
        return registers.view(kind.replace("f", "float"))[..., None]
    halves = np.ascontiguousarray(registers)[..., None].view(np.uint16)
    return bf16_values(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)


def words(raw: np.ndarray, kind: str) -> np.ndarray:
    """float32 from elements in memory."""
    if kind == "tf32":
        return tf32_values(raw)
    return bf16_values(raw) if kind == "bf16" else raw.view(np.float16).astype(np.float32)


def gathered(registers: np.ndarray, part: str, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """[warps, *shape]: an operand from [warps, registers, 32] patterns."""
    held = values(registers, kind)
    row, column = rows_and_columns(part, held.shape[-1], registers.shape[1])
    out = np.empty((registers.shape[0], *shape), held.dtype)
    out[:, row, column] = held
    return out


def scattered(matrix: np.ndarray) -> np.ndarray:
    """[warps, registers, 32] patterns of sums [warps, rows, columns]."""
    row, column = rows_and_columns("d", 1, matrix.shape[1] * matrix.shape[2] // 32)
    return matrix[:, row[..., 0], column[..., 0]].view(f"u{matrix.itemsize}")


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, in the type of c."""
    return (a.astype(np.float64) @ b.astype(np.float64) + c).astype(c.dtype)


def from_rows(rows: np.ndarray, transposed: bool) -> np.ndarray:
    """[warps, matrices, 32] patterns, as ldmatrix distributes [warps, matrices, 8, 8] elements of 16 bits."""
    if transposed:
        rows = rows.swapaxes(-1, -2)
    pairs = rows.reshape(*rows.shape[:2], 32, 2)
    return np.ascontiguousarray(pairs).view(np.uint32)[..., 0]


def to_rows(registers: np.ndarray, transposed: bool) -> np.ndarray:
    """What stmatrix does: the inverse of `from_rows`."""
    rows = np.ascontiguousarray(registers)[..., None].view(np.uint16).reshape(*registers.shape[:2], 8, 8)
    return rows.swapaxes(-1, -2) if transposed else rows


def operand_places(descriptor: np.ndarray, shape: tuple[int, int], width: int, k_last: bool) -> np.ndarray:
    """[groups, *shape]: addresses of an operand of wgmma's in shared memory.

    Args:
        descriptor: uint64, one for each group of four warps.
        shape: (M or N, K).
        width: bytes of an element.
        k_last: K is the dimension whose elements are neighbours in memory.
    """
    field: Callable[[int, int], np.ndarray] = lambda low, bits: (  # noqa: E731
        descriptor >> np.uint64(low) & np.uint64((1 << bits) - 1)
    ).astype(np.int64)[:, None, None]
    start, leading, stride = (field(low, 14) * 16 for low in (0, 16, 32))
    modes = np.unique(field(62, 2))
    if len(modes) != 1 or field(49, 3).any():
        raise EmulationError(f"wgmma: descriptor {int(descriptor[0]):#x} has an offset of its base, or not one swizzle")
    swizzle = _SWIZZLES[int(modes[0])]
    outer, k = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    if k_last and swizzle:
        if shape[1] * width > swizzle:
            raise EmulationError(f"wgmma: {shape[1] * width} bytes along K with a swizzle of {swizzle}")
        place = outer // 8 * stride + outer % 8 * swizzle + k * width
    elif k_last:
        place = outer // 8 * stride + outer % 8 * 16 + k * width // 16 * leading + k * width % 16
    elif swizzle:
        place = outer * width // swizzle * leading + outer * width % swizzle + k // 8 * stride + k % 8 * swizzle
    else:
        raise EmulationError("wgmma: an operand with K first and no swizzle is not known")
    place = place + start
    return place ^ (place >> 7 & (swizzle // 16 - 1 if swizzle else 0)) << 4


def shape_of(opcode: str) -> tuple[int, int, int]:
    """(M, N, K) of m64n32k16."""
    found = next(part for part in opcode.split(".") if part.startswith("m") and part[1:2].isdigit())
    m, rest = found[1:].split("n")
    n, k = rest.split("k")
    return int(m), int(n), int(k)


def kind_of(opcode: str) -> str:
    """The operands' type, which has to be one for both, with sums in float32, or float64 for that.

    Raises:
        EmulationError: they are something else.
    """
    kinds: Sequence[str] = [part for part in opcode.split(".") if part in TYPES]
    if kinds == ["f64"] * 4:
        return "f64"
    operands = set(kinds) - {"f32"}
    if len(operands) != 1 or not operands <= {"bf16", "f16", "tf32"}:
        raise EmulationError(f"unknown product {opcode!r}")
    return operands.pop()
