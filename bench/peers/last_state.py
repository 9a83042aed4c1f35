"""The scan at the last position in closed form, exact and by nodes, against the scan at all positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import _bounds
from bench.peers._problem import INPUTS, Arguments, Peer, Problem, Shape, channels_first, draw, through
from bench.peers.selective_scan import DIM, weights
from fastm2rec import impl, ops
from fastm2rec.reference.last_state import last_state as specification

SOFTPLUS = 2  # an exponential and a logarithm
NODES = 2  # true exponentials of a position and channel; the other powers are squares
SCANS = ("triton", "mamba_ssm")  # all positions, of which the last is kept


def problem(shape: Shape, device: torch.device, autotune: bool) -> Problem:
    """u, delta, A, B, C, D, z, delta_bias, as `ops.last_state` names them."""
    assert shape.d_state is not None
    drawn: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(shape.seq_len)}
    A, D, bias = weights(shape.d_state, drawn)
    nodes = ops.fit_nodes(A)
    sizes: dict[str, Any] = {**drawn, "dtype": shape.torch_dtype}

    def arguments() -> Arguments:
        u, delta = (channels_first(shape.batch, DIM, shape.seq_len, **sizes) for _ in range(2))
        B = channels_first(shape.batch, shape.d_state or 0, shape.seq_len, **sizes)
        C, z = draw(shape.batch, shape.d_state or 0, **sizes), draw(shape.batch, DIM, **sizes)
        return u, delta, A, B, C, D, z, bias

    def exact(*arguments: Tensor | None, impl: str) -> Tensor:
        function: Any = ops.last_state
        return function(*arguments, True, impl=impl)

    def by_nodes(*arguments: Tensor | None, impl: str) -> Tensor:
        function: Any = ops.last_state
        return function(*arguments, True, exponentials="nodes", nodes=nodes, impl=impl)

    def reference(*arguments: Tensor | None) -> Tensor:
        function: Any = specification
        return function(*arguments, True)

    approximate = through("last_state", "triton", by_nodes, device)
    exact_work, nodes_work = _work(shape, nodes=False), _work(shape, nodes=True)
    scans = [_scan(name, device) for name in SCANS]
    return Problem(
        what=f"E={DIM}, D, z, softplus",
        inputs=[arguments() for _ in range(INPUTS)],
        batched=(True, True, False, True, True, False, True, False),
        learned=(True,) * 8,
        reference=reference,
        peers=[
            through("last_state", "triton", exact, device),
            Peer(
                "triton, nodes", "eager", approximate.run, approximate.skipped, work=nodes_work,
                error=nodes.error * shape.d_state,  # every state may be off by the fit's error
            ),
            through("last_state", "reference", exact, device),
            *scans,
        ],
        work=exact_work,
    )  # fmt: skip


def _scan(name: str, device: torch.device) -> Peer:
    """The same through an implementation's scan at all positions: C and z count at the last one only."""
    reason = impl.unavailable("selective_scan", name, device)

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        scan: Any = ops.selective_scan
        y = scan(u, delta, A, B, C, D, None, bias, True, impl=name)[:, :, -1]
        return y * torch.nn.functional.silu(z)

    def layout(arguments: Arguments) -> Arguments:
        u, delta, A, B, C, D, z, bias = arguments
        assert C is not None
        assert u is not None
        # C for every position, as a model has it before it knows which one is asked for.
        everywhere = C[:, :, None].expand(-1, -1, u.shape[2]).transpose(1, 2).contiguous().transpose(1, 2)
        made = (u, delta, A, B, everywhere, D, z, bias)
        if name == "triton":
            return made
        return tuple(x.contiguous() if x is not None and x.dim() == 3 else x for x in made)

    # Trained at the last position only, its C has another shape and gradient than the problem's.
    return Peer(f"{name}, all positions", "eager", None if reason else run, reason, layout, trains=False)


def _work(shape: Shape, nodes: bool) -> _bounds.Work:
    """u, delta and B are read once; what is left of C, z and y does not count.

    Exact: an exponential for each state. Nodes: two for each position and channel, and the product of the positions'
    B with the coefficients. The backward pass makes the exact exponentials again and writes three gradients.
    """
    assert shape.d_state is not None
    places, training = shape.batch * shape.seq_len, shape.phase == "training"
    exponentials = (NODES if nodes else shape.d_state) + SOFTPLUS
    again = training * (shape.d_state + SOFTPLUS)
    return _bounds.Work(
        special=float(places * DIM * (exponentials + again)),
        operations=float(places * DIM * shape.d_state * 4 * (3 if training else 1)),
        bytes=float(shape.torch_dtype.itemsize * places * (2 * DIM + shape.d_state) * (3 if training else 1)),
    )
