"""The symmetries of a spectral basis V [n, R], which leave a quarter or a half of its products.

Positions whose rows of V have the same absolute values make an orbit; within one, a column's signs follow its class:

    Fourier, n even: t, n/2 - t, n/2 + t, n - t    even cos + + + +, even sin + - + -, odd cos + - - +, odd sin + + - -
    Fourier, n odd:  t, n - t                      cos + +, sin + -
    DCT:             t, n - 1 - t                  even + +, odd + -

("even", "odd": the frequency's number). So V^T x needs the sums of x over each orbit with each class's signs, the fold,
and V's rows of one position an orbit; V bins has one partial sum for each class, which give all of the orbit's values.
Where an orbit meets itself (t = 0, n/4, n/2) it has fewer positions: a missing one counts as zero.

With a column of zeros for the sine of frequency 0, the classes take turns: column c is of class c modulo their number.
Packed, each class has its columns side by side, so that its products are those of two matrices. A matrix without such a
symmetry has orbits of one position. Which it has is read off its values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Values that are equal by symmetry were computed from angles up to a full turn, hence with a few roundings.
_ROUNDINGS = 16
ORBITS = 3  # that `symmetry_kernels.expand` does at once; their number is rounded up, with orbits of no position


class Orbits(NamedTuple):
    """A basis by its orbits."""

    positions: Tensor  # [T, classes] int64, -1 where there is none
    rows: Tensor  # [T, columns], V at the first position of each orbit
    source: Tensor  # [columns] int64, V's columns in the order of `rows`; -1 for one of zeros


def _signs(classes: int) -> Tensor:
    """[class, place in the orbit], the rows of a Hadamard matrix."""
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, -1, -1, 1], [1, 1, -1, -1]])
    return signs[:classes, :classes]


def _candidates(n: int) -> list[tuple[Tensor, bool]]:
    """Orbits [T, classes] of n positions, most classes first, and whether the basis has a frequency without a sine."""
    quarter, half = torch.arange(n // 4 + 1), torch.arange((n + 1) // 2)
    fourier = (
        torch.stack([half, n - half], dim=1)
        if n % 2
        else torch.stack([quarter, n // 2 - quarter, n // 2 + quarter, n - quarter], dim=1)
    )
    dct = torch.stack([half, n - 1 - half], dim=1)
    return [(fourier % n, True), (dct, False), (torch.arange(n)[:, None], False)]


def _holds(rows: Tensor, positions: Tensor) -> bool:
    classes = positions.shape[1]
    signs = _signs(classes).to(rows.dtype)[torch.arange(rows.shape[1]) % classes]  # [columns, classes]
    expected = rows[positions[:, 0], None] * signs.mT
    bound = _ROUNDINGS * torch.finfo(rows.dtype).eps * rows.abs().max()
    return bool((rows[positions] - expected).abs().max() <= bound)


def orbits(basis: Tensor) -> Orbits:
    """The orbits of V [n, R]; columns of zeros at its end are left out."""
    n = len(basis)
    used = basis.any(0).nonzero()
    columns = int(used[-1]) + 1 if len(used) else 1
    basis = basis[:, :columns]
    for positions, lacks_sine in _candidates(n):
        source = torch.arange(columns)
        rows = basis
        if lacks_sine:
            source = torch.cat([source[:1], torch.tensor([-1]), source[1:]])
            rows = torch.cat([basis[:, :1], torch.zeros_like(basis[:, :1]), basis[:, 1:]], dim=1)
        if _holds(rows, positions):
            break
    repeated = (positions[:, :, None] == positions[:, None]).tril(-1).any(2)
    return Orbits(positions.masked_fill(repeated, -1), rows[positions[:, 0]], source)


class Symmetry(NamedTuple):
    """The orbits of several bases as the kernels read them; a slot is a place in an orbit, t * classes + place."""

    basis: Tensor  # [spectra, orbits, columns], class by class, zeros behind what a class has
    counts: Tensor  # [spectra, 2] int64, the numbers of classes and of orbits
    positions: Tensor  # [spectra, slots] int64, the position in each slot, -1 for none
    slots: Tensor  # [spectra, max_len] int64, the slot of each position
    columns: list[Tensor]  # of each basis, V's column of each of these; -1 for one of zeros


def pack(bases: Tensor, lengths: list[int], multiple: int) -> Symmetry:
    """Of V [spectra, max_len, R], each over its own length; `multiple`, of the columns, is a multiple of four."""
    found = [orbits(basis[:length]) for basis, length in zip(bases, lengths, strict=True)]
    columns = max(_whole(one.rows.shape[1], multiple) for one in found)
    count = max(_whole(len(one.rows), ORBITS) for one in found)
    size = max(_whole(len(one.rows), ORBITS) * one.positions.shape[1] for one in found)
    packed = bases.new_zeros(len(found), count, columns)
    positions = torch.full((len(found), size), -1)
    slots = torch.full((len(found), bases.shape[1]), -1)
    for i, one in enumerate(found):
        packed[i, : len(one.rows)] = _by_class(one.rows, one, columns, 0)
        flat = one.positions.flatten()
        positions[i, : len(flat)] = flat
        there = (flat >= 0).nonzero().squeeze(1)
        slots[i, flat[there]] = there
    counts = torch.tensor([[one.positions.shape[1], len(one.positions)] for one in found])
    sources = [_by_class(one.source, one, columns, -1) for one in found]
    return Symmetry(packed, counts, positions, slots, sources)


def _whole(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def _by_class(x: Tensor, one: Orbits, columns: int, value: int) -> Tensor:
    """[..., columns of `one`] to [..., columns], class by class, with `value` behind them."""
    padded = F.pad(x, (0, columns - x.shape[-1]), value=value)
    return padded.unflatten(-1, (-1, one.positions.shape[1])).transpose(-1, -2).flatten(-2)


def reordered(x: Tensor, columns: list[Tensor]) -> Tensor:
    """[spectra, R] in the order of `Symmetry.columns`, zeros where that has -1."""
    padded = F.pad(x, (0, 1))  # -1 is the last one
    return torch.stack([row[order] for row, order in zip(padded, columns, strict=True)])
