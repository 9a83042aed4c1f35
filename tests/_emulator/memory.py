"""Global and shared memory: bounds, alignment, and who has touched what since the last barrier.

Notes on touches are kept for every two bytes. A block's barriers divide its time into epochs. In one epoch a place that
one warp writes may be neither read nor written by another, unless what is written is there already: a compiler may let
several warps write what all of them hold. Blocks never meet: a place that one of them writes, no other may touch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .program import EmulationError

GRANULE = 2
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
MANY = 0xFF  # warps of a block


@dataclass(frozen=True)
class Who:
    """The threads of an access: of each the block (from 1), its epoch and its warp, all int64."""

    block: np.ndarray
    epoch: np.ndarray
    warp: np.ndarray

    def __getitem__(self, part: np.ndarray) -> Who:
        return Who(self.block[part], self.epoch[part], self.warp[part])

    def code(self) -> np.ndarray:
        return self.block << 40 | self.epoch << 8 | self.warp


class Memory:
    """Bytes, seen as words of several widths, with notes: `Who.code()`, 0 for nobody, -1 for several blocks."""

    def __init__(self, data: np.ndarray, name: str) -> None:
        self._views = {width: data.view(word) for width, word in WORDS.items()}
        self._written = np.zeros(data.size // GRANULE, np.int64)
        self._read = np.zeros(data.size // GRANULE, np.int64)
        self._name = name

    def load(self, place: np.ndarray, width: int, count: int, who: Who) -> np.ndarray:
        """[threads, count] words of `width` bytes, from these byte offsets on."""
        granules, code = self._granules(place, width * count, who)
        meets = np.asarray(_conflict(self._written[granules], code))
        self._refuse(meets.any(axis=1), "reads what another one writes", who)
        self._note_read(granules, code)
        return self._views[width][place[:, None] // width + np.arange(count)]

    def store(self, place: np.ndarray, width: int, values: np.ndarray, who: Who) -> None:
        """Write `values`, [threads, count] words of `width` bytes, from these byte offsets on."""
        index, view = place[:, None] // width + np.arange(values.shape[1]), self._views[width]
        granules, code = self._granules(place, width * values.shape[1], who)
        meets = _conflict(self._written[granules], code) | _conflict(self._read[granules], code)
        if meets.any():
            new = np.asarray(view[index] != values)
            self._refuse(meets.any(axis=1) & new.any(axis=1), "writes what another one touches", who)
        self._written[granules] = code
        view[index] = values
        # Lanes of one warp may: after a reduction they hold sums that differ in the last place, as each lane has fused
        # the product that is its own with the sum of the others. One of them stays.
        other = (self._written[granules] != code).any(axis=1)
        self._refuse(other & (view[index] != values).any(axis=1), "writes at once what another one writes", who)

    def _note_read(self, granules: np.ndarray, code: np.ndarray) -> None:
        before = self._read[granules]
        merged = np.where(before >> 8 == code >> 8, code | MANY, code)  # another warp in this epoch
        merged = np.where(before >> 40 == code >> 40, merged, -1)
        merged = np.where((before == 0) | (before == code), code, merged)
        self._read[granules] = merged
        now = self._read[granules]
        several = now != merged  # threads of this very access, of several warps or blocks
        if several.any():
            same = now >> 40 == merged >> 40
            self._read[granules[several & same]] = now[several & same] | MANY
            self._read[granules[several & ~same]] = -1

    def _granules(self, place: np.ndarray, size: int, who: Who) -> tuple[np.ndarray, np.ndarray]:
        """[threads, granules]: the granules of every access, and who touches them."""
        granules = place[:, None] // GRANULE + np.arange(max(1, size // GRANULE))
        return granules, np.broadcast_to(who.code()[:, None], granules.shape)

    def _refuse(self, wrong: Any, what: str, who: Who) -> None:
        if wrong.any():
            first = int(wrong.argmax())
            by = "a product" if who.warp[first] == MANY else f"warp {who.warp[first]}"
            raise EmulationError(
                f"{self._name}: {by} of block {who.block[first] - 1} {what}, without a barrier between them"
            )


def _conflict(before: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Was it another block, or another warp in the same epoch?"""
    return (before != 0) & (before != code) & ((before >> 40 != code >> 40) | (before >> 8 == code >> 8))


class Shared:
    """The shared memory of several blocks; all of it NaN at first."""

    def __init__(self, blocks: int, size: int) -> None:
        self._size = size
        self._pitch = -(-max(size, 1) // 1024) * 1024  # swizzled tiles are aligned to that
        self._memory = Memory(np.full(blocks * self._pitch, 0xFF, np.uint8), "shared memory")

    def load(self, address: np.ndarray, width: int, count: int, who: Who, block: np.ndarray) -> np.ndarray:
        """As `Memory.load`, at addresses within the shared memory of each thread's block (from 0)."""
        return self._memory.load(self._place(address, width * count, block), width, count, who)

    def store(self, address: np.ndarray, width: int, values: np.ndarray, who: Who, block: np.ndarray) -> None:
        """As `Memory.store`, likewise."""
        self._memory.store(self._place(address, width * values.shape[1], block), width, values, who)

    def _place(self, address: np.ndarray, size: int, block: np.ndarray) -> np.ndarray:
        address = address.astype(np.int64)
        _refuse_unaligned(address, size, "shared memory")
        if ((address < 0) | (address + size > self._size)).any():
            raise EmulationError(
                f"shared memory: {size} bytes at {int(address.min())} to {int(address.max())}, a block has {self._size}"
            )
        return address + block * self._pitch


class Global:
    """The tensors that a launch was given, where they are."""

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        extents: list[tuple[int, int, str]] = []
        for start, end, name in sorted(_extent(name, tensor) for name, tensor in tensors if tensor.numel()):
            if extents and start < extents[-1][1]:  # two arguments share memory
                before = extents.pop()
                start, end, name = before[0], max(before[1], end), f"{before[2]}, {name}"
            extents.append((start, end, name))
        self._extents = extents
        self._starts, self._ends = (np.array([one[i] for one in extents], np.uint64) for i in (0, 1))
        self._bases = [start // 16 * 16 for start, _, _ in extents]
        self._memories = [
            Memory(_bytes_at(base, -(-(end - base) // 16) * 16), f"tensor {name}")
            for base, (_, end, name) in zip(self._bases, extents, strict=True)
        ]

    def load(self, address: np.ndarray, width: int, count: int, who: Who) -> np.ndarray:
        """As `Memory.load`, at addresses of the process."""
        values = np.empty((address.size, count), WORDS[width])
        for memory, place, part in self._parts(address, width * count):
            values[part] = memory.load(place, width, count, who[part])
        return values

    def store(self, address: np.ndarray, width: int, values: np.ndarray, who: Who) -> None:
        """As `Memory.store`, likewise."""
        for memory, place, part in self._parts(address, width * values.shape[1]):
            memory.store(place, width, values[part], who[part])

    def _parts(self, address: np.ndarray, size: int) -> Iterator[tuple[Memory, np.ndarray, np.ndarray]]:
        """For each tensor that is touched: its memory, the offsets, and which threads touch it."""
        _refuse_unaligned(address, size, "global memory")
        region = np.searchsorted(self._starts, address, side="right") - 1
        inside = region >= 0
        if inside.any():
            inside &= address + np.uint64(size) <= self._ends[region]
        if not inside.all():
            wrong = int(address[~inside][0])
            near = min(
                self._extents, key=lambda one: min(abs(wrong - one[0]), abs(wrong - one[1])), default=(0, 0, "nil")
            )
            raise EmulationError(
                f"global memory: {size} bytes at {wrong - near[0]:+} of {near[2]}, which has {near[1] - near[0]} bytes"
            )
        for i in np.unique(region):
            part = np.flatnonzero(region == i)
            yield self._memories[i], (address[part] - np.uint64(self._bases[i])).astype(np.int64), part


def _extent(name: str, tensor: torch.Tensor) -> tuple[int, int, str]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size(), name


def _bytes_at(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _refuse_unaligned(address: np.ndarray, size: int, name: str) -> None:
    unaligned = address % address.dtype.type(size) != 0
    if unaligned.any():
        raise EmulationError(f"{name}: {size} bytes at {int(address[unaligned][0])}, which is not a multiple of that")
