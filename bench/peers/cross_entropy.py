"""The loss over the whole catalogue, whose scores are a training step's largest tensor: 3,706 items, 64 channels.

The peers: the scores as one matrix and torch's cross-entropy of it, eager and compiled; the reference, which is torch's
`linear_cross_entropy` where torch has it, some rows at a time; and the CPU engine, scores and gradients in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import _bounds
from bench._measure import REFERENCE_ROWS
from bench.peers._problem import INPUTS, Arguments, Peer, Problem, Shape, compiled, draw, through
from fastm2rec import ops
from fastm2rec.reference.cross_entropy import cross_entropy as specification

D_MODEL, N_ITEMS = 64, 3706


def problem(shape: Shape, device: torch.device, autotune: bool) -> Problem:
    """query, weight, targets, as `ops.cross_entropy` names them; the sum over the rows, given as the loss of each row.

    Every row of an output has its place in [B, ...] elsewhere. A view of one number as [B] costs nothing; its gradient
    is B numbers added up.
    """
    if shape.batch > REFERENCE_ROWS:  # it would be given some rows at a time, of which the loss is another number
        raise ValueError(f"batch: expected at most {REFERENCE_ROWS}, which the reference takes at once")
    drawn: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(shape.batch)}
    sizes: dict[str, Any] = {**drawn, "dtype": shape.torch_dtype}
    weight = draw(N_ITEMS + 1, D_MODEL, **sizes) * D_MODEL**-0.5

    def arguments() -> Arguments:
        return draw(shape.batch, D_MODEL, **sizes), weight, torch.randint(1, N_ITEMS + 1, (shape.batch,), **drawn)

    def call(query: Tensor, weight: Tensor, targets: Tensor, *, impl: str) -> Tensor:
        return ops.cross_entropy(query, weight, targets, "sum", impl=impl).expand(len(query))

    def reference(query: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return specification(query, weight, targets, "sum").expand(len(query))

    def plain(query: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(query @ weight[1:].t(), targets - 1, reduction="sum").expand(len(query))

    eager = Peer("torch", "eager", plain)
    return Problem(
        what=f"D={D_MODEL}, {N_ITEMS} items",
        inputs=[arguments() for _ in range(INPUTS)],
        batched=(True, False, True),
        learned=(True, True, False),
        reference=reference,
        peers=[
            through("cross_entropy", "cpu", call, device),
            through("cross_entropy", "reference", call, device),
            eager,
            *compiled(eager, device, autotune),
        ],
        work=_work(shape),
    )


def _work(shape: Shape) -> _bounds.Work:
    """Each score is a product and an exponential. Queries, items and targets are read once, scores stay in a cache.

    The gradients are two more products, of what the exponentials gave: softmax minus one-hot. They may be made in the
    same pass, so nothing is read again; what is written is the size of what is read, with a zero row for padding.
    """
    training = shape.phase == "training"
    scores, numbers = shape.batch * N_ITEMS, (shape.batch + N_ITEMS) * D_MODEL
    return _bounds.Work(
        special=float(scores + shape.batch),
        operations=2.0 * scores * D_MODEL * (3 if training else 1),
        bytes=float(shape.torch_dtype.itemsize * (numbers + training * (numbers + D_MODEL)) + 8 * shape.batch),
    )
