"""Launches, executed: a driver for Triton that runs what it compiled, here."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton
from torch import Tensor

from bench._dry import Compiled, Driver

from .instructions import steps
from .machine import Machine
from .memory import Global
from .program import EmulationError, parse

THREADS = 8192  # at once, about: numpy then spends its time on numbers and not on calls


class Kernel:
    """One compiled kernel.

    Args:
        ptx: its text.
        warps: per block.
        shared: bytes of shared memory per block.

    Raises:
        EmulationError: an instruction is not known.
    """

    def __init__(self, ptx: str, warps: int, shared: int) -> None:
        self._program = parse(ptx)
        self._steps = steps(self._program)
        self._warps, self._shared = warps, shared

    def run(self, grid: Sequence[int], blocks: np.ndarray, arguments: Sequence[tuple[str, int | Tensor]]) -> None:
        """Run some blocks of a grid of three sizes.

        Args:
            grid: the sizes.
            blocks: [blocks, 3], which of it.
            arguments: names, and tensors or bit patterns; what a kernel has beyond them is zero.

        Raises:
            EmulationError: something that a GPU would do wrong, with the Python line and the instruction.
        """
        patterns = np.zeros(len(self._program.parameters), np.uint64)
        patterns[: len(arguments)] = [v.data_ptr() if isinstance(v, Tensor) else v for _, v in arguments]
        memory = Global([(name, value) for name, value in arguments if isinstance(value, Tensor)])
        at_once = max(1, THREADS // (32 * self._warps))
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), at_once):
                part = blocks[first : first + at_once]
                machine = Machine(self._program, part, grid, self._warps, self._shared, memory, patterns)
                try:
                    machine.run(self._steps)
                except EmulationError as error:
                    at = self._program.instructions[machine.at]
                    raise EmulationError(f"{self._program.name}, {at.where}: {at.text}: {error}") from error


class Emulator(Driver):
    """A driver whose device computes."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch
        self._kernels: dict[str, Kernel] = {}

    def launch(
        self, compiled: Compiled, grid: tuple[int, int, int], arguments: dict[str, Any], signature: dict[str, str]
    ) -> None:
        super().launch(compiled, grid, arguments, signature)
        metadata = compiled.metadata
        if metadata.hash not in self._kernels:
            self._kernels[metadata.hash] = Kernel(compiled.ptx, metadata.num_warps, metadata.shared)
        given = [
            (name, value if isinstance(value, Tensor) else _pattern(value, signature[name]))
            for name, value in arguments.items()
            if signature[name] != "constexpr"
        ]
        self._kernels[metadata.hash].run(grid, self.blocks(grid), given)

    def blocks(self, grid: tuple[int, int, int]) -> np.ndarray:
        """[blocks, 3]: those that are run, here all of them."""
        return np.stack(np.meshgrid(*(np.arange(size) for size in grid), indexing="ij"), axis=-1).reshape(-1, 3)


def _pattern(value: Any, kind: str) -> int:
    """What a parameter's register holds."""
    if kind.startswith("fp"):
        return int.from_bytes(struct.pack({"fp32": "<f", "fp64": "<d"}[kind], value), "little")
    return int(value) & ((1 << 64) - 1)


def activate(emulator: Emulator) -> None:
    """From now on Triton compiles for this device, and what it launches runs here."""
    triton.runtime.driver.set_active(emulator)
