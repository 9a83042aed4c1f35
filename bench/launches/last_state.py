"""The closed form of the last position as the model calls it: exact, with nodes, split over time, and backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bench._gates import MUFU_EXACT, MUFU_NODES
from bench.launches._launch import Launch
from fastm2rec.kernels import _last_state_exact, _last_state_nodes
from fastm2rec.kernels._nodes import fit_nodes
from fastm2rec.kernels.last_state import launch_backward, launch_forward

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH, DIM = 2, 128


def _arguments(dtype: torch.dtype, dstate: int, seqlen: int, bare: bool, wide: bool = False) -> tuple[Any, ...]:
    """u to lengths, as `launch_forward` takes them; B is a view of a projection's output, not aligned."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    u, delta = (zeros(BATCH, seqlen, DIM).transpose(1, 2) for _ in range(2))
    # Rates from 1 to 100 take all 16 nodes, the usual ones 10 or 12.
    A = -(torch.logspace(0, 2, dstate) if wide else torch.arange(1.0, dstate + 1)).repeat(DIM, 1)
    B, C = zeros(BATCH, seqlen, 4 + dstate)[..., 4:].transpose(1, 2), zeros(BATCH, dstate)
    optional: tuple[Any, ...] = (None, None, None, False, None)
    if not bare:
        optional = (torch.zeros(DIM), zeros(BATCH, DIM), torch.zeros(DIM), True, torch.tensor([seqlen, 1]))
    return (u, delta, A, B, C, *optional)


def _forward(dtype: torch.dtype, dstate: int, seqlen: int, nodes: bool, splits: int, bare: bool, wide: bool) -> None:
    arguments = _arguments(dtype, dstate, seqlen, bare, wide)
    rates, coefficients = None, None
    if nodes:
        fit = fit_nodes(arguments[2])
        rates, coefficients = fit.rates, fit.coefficients
    launch_forward(*(*arguments, rates, coefficients, splits))


def _backward(dtype: torch.dtype, dstate: int, seqlen: int, bare: bool) -> None:
    arguments = _arguments(dtype, dstate, seqlen, bare)
    launch_backward(*(torch.zeros(BATCH, DIM, dtype=dtype), *arguments, torch.zeros(BATCH, DIM)))


def _case(
    direction: str,
    name: str,
    dstate: int,
    seqlen: int = 200,
    nodes: bool = False,
    splits: int = 1,
    bare: bool = False,
    wide: bool = False,
) -> Launch:
    kernel = "last_state_nodes_kernel" if nodes else "last_state_exact_kernel"
    blocks = (_last_state_nodes if nodes else _last_state_exact).blocks(DIM, dstate)
    # The exact kernel's loop takes one position at a time.
    elements = blocks["BLOCK_E"] * dstate * (blocks["BLOCK_T"] if nodes else 1)
    words = [direction, name, f"N={dstate}", f"L={seqlen}"]
    words += ["nodes"] * nodes + [f"splits={splits}"] * (splits > 1) + ["bare"] * bare + ["wide"] * wide
    forward = direction == "forward"
    run = (
        functools.partial(_forward, DTYPES[name], dstate, seqlen, nodes, splits, bare, wide)
        if forward
        else functools.partial(_backward, DTYPES[name], dstate, seqlen, bare)
    )
    return Launch(
        "last_state",
        " ".join(words),
        run,
        dots=(kernel,) if nodes else (),
        mufu={kernel: (MUFU_NODES if nodes else MUFU_EXACT, elements)} if forward else {},
        core=name == "bf16" and dstate in (16, 32) and seqlen == 200 and not (bare or wide),
    )


CASES = [
    *(
        _case("forward", name, dstate, seqlen, nodes)
        for name in DTYPES
        for nodes in (False, True)
        for dstate in (16, 32)
        for seqlen in (50, 200, 1024)
    ),
    *(_case("forward", name, 16, 1024, nodes, splits=8) for name in DTYPES for nodes in (False, True)),
    *(_case("forward", name, 16, nodes=nodes, bare=True) for name in DTYPES for nodes in (False, True)),
    *(_case("forward", name, dstate, nodes=True, wide=True) for name in DTYPES for dstate in (16, 32)),
    *(_case("forward", name, 64, nodes=nodes) for name in DTYPES for nodes in (False, True)),
    *(_case("backward", name, dstate, seqlen) for name in DTYPES for dstate in (16, 32) for seqlen in (50, 200, 1024)),
    *(_case("backward", name, 16, bare=True) for name in DTYPES),
    *(_case("backward", name, 64) for name in DTYPES),
]
