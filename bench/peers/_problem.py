"""What a kernel benchmark is made of: a problem (an op at one shape, with data) and the peers that solve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import _bounds
from bench._modes import cannot_compile
from fastm2rec import impl

INPUTS = 4  # sets that are rotated, so that none waits in the cache
PHASES = ("forward", "training")  # training: forward and backward
LENGTHLESS = ("gated_fusion", "cross_entropy", "output_ffn")  # ops whose rows have no positions

Arguments = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Shape:
    """Where a problem is measured. `d_state` is None for ops that have no states."""

    op: str
    phase: str
    dtype: str
    batch: int
    seq_len: int
    d_state: int | None = 16

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Peer:
    """One way to solve a problem.

    Args:
        impl: what computes it.
        mode: "eager", "compiled" or "compiled, max-autotune".
        run: takes the problem's arguments, returns [B, ...]; None where `skipped` says why there is none.
        skipped: the reason.
        layout: turns the problem's arguments into those that this peer likes best, outside the timing.
        work: what it must at least do, where that is not the problem's.
        error: of its approximation, on top of the roundings.
        trains: has a gradient.
        foreign: runs in another library, which may end the process, so it is measured after everything else; torch does
            not see what it allocates.
    """

    impl: str
    mode: str
    run: Callable[..., Tensor] | None = None
    skipped: str | None = None
    layout: Callable[[Arguments], Arguments] = tuple
    work: _bounds.Work | None = None
    error: float = 0.0
    trains: bool = True
    foreign: bool = False


@dataclass(frozen=True)
class Problem:
    """An op at one shape.

    Args:
        what: the sizes that are not in `Shape`, in words.
        inputs: `INPUTS` sets of arguments.
        batched: for each argument, whether its first axis is the batch.
        learned: for each argument, whether training wants its gradient.
        reference: the specification, on arguments in float32.
        peers: who solves it.
        work: what every exact solution must at least do.
    """

    what: str
    inputs: Sequence[Arguments]
    batched: tuple[bool, ...]
    learned: tuple[bool, ...]
    reference: Callable[..., Tensor]
    peers: Sequence[Peer]
    work: _bounds.Work


def through(op: str, name: str, call: Callable[..., Tensor], device: torch.device, **fields: Any) -> Peer:
    """One of the package's implementations of `op`, by name; `call(*arguments, impl=name)`."""
    reason = impl.unavailable(op, name, device)

    def run(*arguments: Tensor | None) -> Tensor:
        return call(*arguments, impl=name)

    return Peer(name, "eager", None if reason else run, reason, **fields)


def compiled(peer: Peer, device: torch.device, autotune: bool) -> list[Peer]:
    """The same through torch.compile; with `autotune` also with the search over matrix-product kernels (CUDA only)."""
    modes = {"compiled": "default"}
    if autotune and device.type == "cuda":
        modes["compiled, max-autotune"] = "max-autotune-no-cudagraphs"
    reason = peer.skipped or cannot_compile(device)
    found = []
    for mode, word in modes.items():
        run = None if reason or peer.run is None else torch.compile(peer.run, mode=word, dynamic=False)
        found.append(Peer(peer.impl, mode, run, reason, peer.layout, peer.work, peer.error, peer.trains))
    return found


def channels_first(*shape: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random [B, C, L] with channels innermost, as a Linear leaves them behind a transposition."""
    batch, channels, length = shape
    return draw(batch, length, channels, dtype=dtype, device=device, generator=generator).transpose(1, 2)


def draw(*shape: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Normal numbers, drawn where they are needed."""
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
