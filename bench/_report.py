"""What a compiled kernel needs of a multiprocessor, and the time its instructions must take there."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_manager

from bench import _sass
from bench._dry import Compiled

# One multiprocessor: the same numbers for compute capability 8.0, 9.0 and 10.0 but for its shared memory.
REGISTERS, WARPS, BLOCKS, TENSOR_COLUMNS = 65536, 64, 32, 512
SHARED = {80: 167936, 90: 233472, 100: 233472}
SHARED_RESERVED = 1024  # per block, by the system
REGISTER_UNIT = 8  # registers of a thread are given out in eights
SCHEDULERS = 4  # each issues one warp instruction a cycle
MUFU_CYCLES = 8  # for one warp instruction: four special-function lanes per scheduler


@dataclass(frozen=True)
class Report:
    """Resources of one specialisation, and what one iteration of its hottest loop does.

    Cycles are a multiprocessor's for one iteration of one program, were nothing ever waited for.
    """

    kernel: str
    arch: int
    warps: int
    registers: int
    spill_bytes: int
    shared: int
    blocks_per_sm: int
    occupancy: float
    dots: int  # in the whole kernel
    loop_instructions: int
    loop_mix: dict[str, int]

    @property
    def issue_cycles(self) -> float:
        return self.loop_instructions * self.warps / SCHEDULERS

    @property
    def mufu_cycles(self) -> float:
        return self.loop_mix["mufu"] * self.warps * MUFU_CYCLES / SCHEDULERS

    @property
    def bound(self) -> str:
        """The larger of the two."""
        return "mufu" if self.mufu_cycles > self.issue_cycles else "issue"

    def per_element(self, instructions: int, elements: int) -> float:
        """Instructions of one lane for each of the elements that an iteration of a program computes."""
        return instructions * self.warps * 32 / elements


def report(compiled: Compiled) -> Report:
    """Read ptxas's log and the machine code; both are kept beside the kernel in Triton's cache."""
    metadata = compiled.metadata
    registers, spills = parse_log(_kept(metadata.hash, "ptxas.log", functools.partial(_ptxas_log, compiled)))
    code = _sass.instructions(_kept(metadata.hash, "sass", functools.partial(_disassemble, compiled)))
    if not code:
        raise RuntimeError(f"{compiled.name}: no instructions found in cuobjdump's output for sm_{compiled.arch}")
    loop = _sass.hottest_loop(code)
    blocks = blocks_per_sm(compiled.arch, metadata.num_warps, registers, metadata.shared, metadata.tmem_size or 0)
    return Report(
        kernel=compiled.name,
        arch=compiled.arch,
        warps=metadata.num_warps,
        registers=registers,
        spill_bytes=spills,
        shared=metadata.shared,
        blocks_per_sm=blocks,
        occupancy=blocks * metadata.num_warps / WARPS,
        dots=_sass.count(code, "dot"),
        loop_instructions=len(loop),
        loop_mix={kind: _sass.count(loop, kind) for kind in _sass.KINDS},
    )


def blocks_per_sm(arch: int, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
    """How many blocks are on a multiprocessor at once; 0 where not even one fits."""
    per_thread = -(-max(registers, 1) // REGISTER_UNIT) * REGISTER_UNIT
    limits = [
        BLOCKS,
        WARPS // warps,
        REGISTERS // (per_thread * 32 * warps),
        SHARED[arch] // (shared + SHARED_RESERVED),
    ]
    if tensor_columns:
        limits.append(TENSOR_COLUMNS // tensor_columns)
    return min(limits)


def parse_log(log: str) -> tuple[int, int]:
    """Registers, and bytes spilled (stores and loads), from what `ptxas -v` says about one kernel."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise RuntimeError(f"expected ptxas -v to name registers and spills, got {log!r}")
    return int(registers.group(1)), int(spills.group(1)) + int(spills.group(2))


def _kept(key: str, name: str, make: Callable[[], str]) -> str:
    cache: Any = get_cache_manager(key)
    path = cache.get_file(name)
    if path is None:
        path = cache.put(make(), name, binary=False)
    with open(path) as file:
        return file.read()


def _ptxas_log(compiled: Compiled) -> str:
    # Through Triton, which knows the flags that it gave; a kernel found in its cache has left no log.
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        make_backend(compiled.metadata.target).make_cubin(compiled.ptx, {}, compiled.metadata, compiled.arch)
    return said.getvalue()


def _disassemble(compiled: Compiled) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
