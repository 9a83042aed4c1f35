"""The machine: all threads of several blocks go through a program together.

Threads that part at a branch go on in turns, those that are furthest behind first, until they meet again. So a barrier
that some threads of a block reach, and others have passed or left behind, is seen when the first of them get there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arithmetic import RAW
from .memory import MANY, Global, Shared, Who
from .program import EmulationError, Program

Mask = np.ndarray  # of bool, one for each thread


@dataclass(frozen=True)
class Step:
    """An instruction, ready to run.

    Args:
        run: does it, for the threads of a mask.
        target: where those go that `run` says, instead of doing anything; `EXIT` is the end.
    """

    run: Callable[[Machine, Mask], Any]
    target: int | None = None


EXIT = -1


@dataclass
class _Copies:
    """Copies of `size` bytes to shared memory under way: of each the thread, addresses, group, and is it of zeros."""

    size: int
    thread: np.ndarray
    to: np.ndarray
    source: np.ndarray
    zeros: np.ndarray
    group: np.ndarray

    def part(self, chosen: np.ndarray) -> _Copies:
        return _Copies(self.size, *(x[chosen] for x in (self.thread, self.to, self.source, self.zeros, self.group)))


@dataclass
class _Reads:
    """What asynchronous products under way have read: a thread of each, places [products, n], what was found there."""

    width: int
    thread: np.ndarray
    places: np.ndarray
    found: np.ndarray
    group: np.ndarray

    def part(self, chosen: np.ndarray) -> _Reads:
        return _Reads(self.width, *(x[chosen] for x in (self.thread, self.places, self.found, self.group)))


class Machine:
    """Some blocks of a launch, in the middle of it.

    Args:
        program: what they run.
        blocks: [blocks, 3], which of the grid's they are.
        grid: its size.
        warps: per block.
        shared: bytes of shared memory per block.
        memory: the tensors.
        parameters: their bit patterns, uint64.
    """

    def __init__(
        self, program: Program, blocks: np.ndarray, grid: Sequence[int], warps: int, shared: int,
        memory: Global, parameters: np.ndarray,
    ) -> None:  # fmt: skip
        self._per_block, count = 32 * warps, len(blocks)
        self.threads = self._per_block * count
        self.registers = [_garbage(bits, self.threads) for bits in program.registers]
        self.memory, self.shared, self.parameters = memory, Shared(count, shared), parameters
        self.block = np.repeat(np.arange(count), self._per_block)
        self._warp = np.tile(np.repeat(np.arange(warps), 32), count)
        self._number = (blocks @ np.array([1, grid[0], grid[0] * grid[1]]))[self.block] + 1
        self._epoch = np.zeros(count, np.int64)
        self.special = {
            "tid.x": np.tile(np.arange(self._per_block, dtype=np.uint32), count),
            **{f"ctaid.{axis}": blocks[self.block, i].astype(np.uint32) for i, axis in enumerate("xyz")},
            **{f"nctaid.{axis}": np.full(self.threads, grid[i], np.uint32) for i, axis in enumerate("xyz")},
        }
        self._copies: list[_Copies] = []
        self._reads: list[_Reads] = []
        self._committed = {"cp": np.zeros(self.threads, np.int64), "wgmma": np.zeros(self.threads, np.int64)}
        self._alive = np.ones(self.threads, np.bool_)
        self._waiting: dict[int, Mask] = {0: self._alive.copy()}  # who goes on from where
        self.at = 0

    def run(self, steps: Sequence[Step]) -> None:
        """Until no thread is left; `at` is the instruction that is being run, for messages."""
        while self._waiting:
            self.at = min(self._waiting)
            mask = self._waiting.pop(self.at)
            while True:
                step = steps[self.at]
                if step.target is not None:
                    leaving = step.run(self, mask)
                    if step.target == EXIT:
                        self._alive &= ~leaving
                    else:
                        self._go_on(step.target, leaving)
                    self._go_on(self.at + 1, mask & ~leaving)
                    break
                step.run(self, mask)
                self.at += 1
                if self.at in self._waiting:
                    self._go_on(self.at, mask)
                    break

    def _go_on(self, at: int, mask: Mask) -> None:
        if mask.any():
            self._waiting[at] = self._waiting[at] | mask if at in self._waiting else mask

    def put(self, register: int, raw: np.ndarray, mask: Mask) -> None:
        """Write bit patterns, one for each thread or one for all, to a register of those in the mask."""
        if mask.all():
            self.registers[register] = np.broadcast_to(raw, (self.threads,))
        else:
            self.registers[register] = np.where(mask, raw, self.registers[register])

    def who(self, thread: np.ndarray) -> Who:
        """As whom these threads touch memory."""
        return Who(self._number[thread], self._epoch[self.block[thread]], self._warp[thread])

    def whole(self, mask: Mask, size: int = 32) -> np.ndarray:
        """Which groups of `size` threads are in the mask; of a warp either all threads have to be, or none."""
        groups = mask.reshape(-1, size)
        some = groups.any(axis=1)
        if (some != groups.all(axis=1)).any():
            raise EmulationError(f"some threads of {size} that belong together are missing")
        return np.flatnonzero(some)

    def barrier(self, mask: Mask) -> None:
        """All threads of a block have come."""
        here, alive = mask.reshape(-1, self._per_block), self._alive.reshape(-1, self._per_block)
        some = here.any(axis=1)
        if (here != alive)[some].any():
            raise EmulationError("a barrier that only some of a block's threads reach")
        self._epoch += some

    def copy(self, size: int, to: np.ndarray, source: np.ndarray, zeros: np.ndarray, thread: np.ndarray) -> None:
        """Begin copies of `size` bytes from global to shared memory, or of zeros. Until they end NaN is there."""
        poison = np.full((thread.size, size // 4), 0xFFFFFFFF, np.uint32)
        self.shared.store(to, 4, poison, self.who(thread), self.block[thread])
        self._copies.append(_Copies(size, thread, to, source, zeros, self._committed["cp"][thread]))

    def read_for_product(self, places: np.ndarray, width: int, thread: np.ndarray) -> np.ndarray:
        """[products, n] words from shared memory, for asynchronous products; `thread` is one of each product's."""
        found = self._read_by_all(places, width, thread)
        self._reads.append(_Reads(width, thread, places, found, self._committed["wgmma"][thread]))
        return found

    def commit(self, kind: str, mask: Mask) -> None:
        """What these threads have begun is a group."""
        self._committed[kind] = self._committed[kind] + mask

    def wait_for_copies(self, groups: int, mask: Mask) -> None:
        """All but the last `groups` groups of copies are done."""
        going_on = []
        for copies in self._copies:
            done = self._done("cp", copies, groups, mask)
            self._finish(copies.part(done))
            if not done.all():
                going_on.append(copies.part(~done))
        self._copies = going_on

    def wait_for_products(self, groups: int, mask: Mask) -> None:
        """Likewise of products; what they read must still be there."""
        going_on = []
        for reads in self._reads:
            done = self._done("wgmma", reads, groups, mask)
            ended = reads.part(done)
            if (self._read_by_all(ended.places, ended.width, ended.thread) != ended.found).any():
                raise EmulationError("shared memory has changed under an asynchronous product")
            if not done.all():
                going_on.append(reads.part(~done))
        self._reads = going_on

    def _done(self, kind: str, started: _Copies | _Reads, groups: int, mask: Mask) -> np.ndarray:
        return mask[started.thread] & (started.group < self._committed[kind][started.thread] - groups)

    def _finish(self, copies: _Copies) -> None:
        words = np.zeros((copies.thread.size, copies.size // 4), np.uint32)
        full = ~copies.zeros
        if full.any():
            words[full] = self.memory.load(copies.source[full], 4, copies.size // 4, self.who(copies.thread[full]))
        self.shared.store(copies.to, 4, words, self.who(copies.thread), self.block[copies.thread])

    def _read_by_all(self, places: np.ndarray, width: int, thread: np.ndarray) -> np.ndarray:
        each = np.repeat(thread, places.shape[1])
        who = self.who(each)
        everybody = Who(who.block, who.epoch, np.full_like(who.warp, MANY))
        return self.shared.load(places.reshape(-1), width, 1, everybody, self.block[each]).reshape(places.shape)


def _garbage(bits: int, threads: int) -> np.ndarray:
    return np.ones(threads, np.bool_) if bits == 1 else np.full(threads, -1, f"i{bits // 8}").view(RAW[bits])
