"""Embedded items, normalised, zero at padding, and the last of each row: a lookup and a LayerNorm.

Without dropout, which each implementation draws in its own way. The peers: torch's functions one after the other, eager
(the reference) and compiled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import _bounds
from bench.peers._problem import INPUTS, Arguments, Peer, Problem, Shape, compiled, draw, through
from fastm2rec import ops
from fastm2rec.reference.embed_norm import embed_norm as specification

D_MODEL, TABLE_ROWS, EPS = 64, 3707, 1e-5
FORWARD, BACKWARD = 7, 14  # operations for each number, see `_work`


def problem(shape: Shape, device: torch.device, autotune: bool) -> Problem:
    """item_ids, lengths, table, weight, bias, as `ops.embed_norm` names them; rows are as long as their batch."""
    drawn: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(shape.seq_len)}
    sizes: dict[str, Any] = {**drawn, "dtype": shape.torch_dtype}
    table = draw(TABLE_ROWS, D_MODEL, **sizes)
    weight, bias = draw(D_MODEL, **sizes), draw(D_MODEL, **sizes)
    lengths = torch.full((shape.batch,), shape.seq_len, device=device)

    def arguments() -> Arguments:
        return torch.randint(TABLE_ROWS, (shape.batch, shape.seq_len), **drawn), lengths, table, weight, bias

    def call(*arguments: Tensor | None, impl: str) -> Any:
        function: Any = ops.embed_norm
        return function(*arguments, EPS, 0.0, impl=impl)

    def reference(*arguments: Tensor | None) -> Tensor:
        function: Any = specification
        return Joined.apply(*function(*arguments, EPS, 0.0))

    plain = through("embed_norm", "reference", call, device)
    return Problem(
        what=f"D={D_MODEL}, {TABLE_ROWS - 1} items",
        inputs=[arguments() for _ in range(INPUTS)],
        batched=(True, True, False, False, False),
        learned=(False, False, True, True, True),
        reference=reference,
        peers=[
            _joined(peer)
            for peer in (through("embed_norm", "cpu", call, device), plain, *compiled(plain, device, autotune))
        ],
        work=_work(shape),
    )


class Joined(torch.autograd.Function):
    """x and the newest, [B, L, C] and [B, C], as one tensor: x, with the newest added at the last position.

    In place, and outside of compiled code: copies of x and its gradient would be a good part of what is timed, and
    torch.compile would fuse them away where others cannot.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, newest: Tensor) -> Tensor:
        x.data[:, -1] += newest  # unseen by autograd, which keeps no x for a gradient
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy[:, -1]


def _joined(peer: Peer) -> Peer:
    function: Any = peer.run

    def run(*arguments: Tensor | None) -> Tensor:
        return Joined.apply(*function(*arguments))

    return peer if function is None else replace(peer, run=run)


def _work(shape: Shape) -> _bounds.Work:
    """Ids and the table's rows are read, x and the newest are written; no row is read from memory twice.

    For each number of x: one addition for the mean, one for the distance from it, two for the variance, one
    multiplication by its root, weight and bias. The backward pass reads ids, rows and dx, normalises the rows again
    instead of keeping them, and writes a gradient for the whole table. For each number: two operations to normalise,
    three for the gradients of weight and bias, one for dx times weight, three for two sums of it along the channels,
    four for what is left of it without them, one to add it to its item.
    """
    training = shape.phase == "training"
    places = shape.batch * shape.seq_len
    rows = min(places, TABLE_ROWS) * D_MODEL
    outputs = (places + shape.batch) * D_MODEL
    numbers = rows + outputs + training * (rows + outputs + TABLE_ROWS * D_MODEL)
    return _bounds.Work(
        special=0.0,
        operations=float(places * D_MODEL * (FORWARD + training * BACKWARD)),
        bytes=float(shape.torch_dtype.itemsize * numbers + 8 * places * (2 if training else 1)),
    )
