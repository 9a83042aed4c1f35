"""What is compiled ahead of time, and what it promises: one module beside this one per op, each with its `CASES`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """One call of a real launcher with tensors of a shape that ships.

    Args:
        op: the name of the module that holds the case.
        name: what is called, with which dtype and sizes: "forward bf16 N=16 L=200".
        run: makes the call, with CPU tensors. Kernels are compiled, not executed: outputs hold anything.
        dots: names of kernels in which tensor-core instructions must be found.
        mufu: for a kernel's name, at most how many special-function instructions per element, and how many elements
            one iteration of its hottest loop computes in one program (BLOCK_T * BLOCK_E * N for a scan); limits
            are in `bench._gates`. The loop is the compiled one: where ptxas unrolls a tiny loop, it counts for more.
        shuffles: the same for values that go from lane to lane.
        core: is one of the few that the tests compile; `bench/resources.py` compiles them all.
    """

    op: str
    name: str
    run: Callable[[], object]
    dots: tuple[str, ...] = ()
    mufu: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    shuffles: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    core: bool = False


def ops() -> list[str]:
    """The ops that have cases, by name."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def collect(names: Sequence[str]) -> list[Launch]:
    """The cases of these ops, in their modules' order.

    Raises:
        ValueError: a case carries another op's name, or two cases of an op have the same name.
    """
    found: list[Launch] = []
    for op in names:
        cases: Sequence[Launch] = importlib.import_module(f"bench.launches.{op}").CASES
        for case in cases:
            if case.op != op:
                raise ValueError(f"bench/launches/{op}.py: expected op {op!r}, got {case.op!r} in {case.name!r}")
            if any(case.name == other.name and case.op == other.op for other in found):
                raise ValueError(f"bench/launches/{op}.py: two cases are called {case.name!r}")
            found.append(case)
    return found
