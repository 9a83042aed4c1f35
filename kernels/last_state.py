"""The scan's output at each row's last position, in closed form: the kernels behind one custom op.

The formula, its gradient and how the work is split are in `_last_state_exact.py`, `_last_state_nodes.py` and
`_last_state_backward.py`; here is which of them runs. All three take inputs of any strides and give results that do not
depend on the other rows of a batch.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import _last_state_exact, _last_state_nodes
from ._common import compute_dtype, triton_dtype
from ._last_state_backward import launch_backward
from ._last_state_output import BLOCK_E, last_state_parts_kernel
from ._nodes import Nodes, accepted


def launch_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    lengths: Tensor | None,
    rates: Tensor | None,
    coefficients: Tensor | None,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """y [B, dim] in u's dtype, and `saved` [B, dim]; with nodes where there are rates and coefficients."""
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    acc = compute_dtype(u, delta, A, B, C, D, z)
    y = torch.empty(batch, dim, dtype=u.dtype, device=u.device)
    saved = torch.empty(batch, dim, dtype=acc, device=u.device)
    parts = torch.empty(splits, batch, dim, dtype=acc, device=u.device) if splits > 1 else None
    if batch == 0:
        return y, saved
    D = None if D is None else D.contiguous()
    bias = None if delta_bias is None else delta_bias.contiguous()
    z_strides = (0, 0) if z is None else z.stride()
    strides = (*u.stride(), *delta.stride(), *B.stride(), *C.stride(), *z_strides)
    flags = {
        "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": bias is not None,
        "HAS_LENGTHS": lengths is not None, "SOFTPLUS": delta_softplus, "SPLITS": splits,
    }  # fmt: skip
    if rates is None or coefficients is None:
        meta = _last_state_exact.blocks(dim, dstate)
        _last_state_exact.last_state_exact_kernel[(batch, triton.cdiv(dim, meta["BLOCK_E"]), splits)](
            u, delta, A.t().to(acc).contiguous(), B, C, D, z, bias, lengths, y, saved, parts,
            batch, dim, dstate, seqlen, *strides, **flags, ACC=triton_dtype(acc), **meta,
        )  # fmt: skip
    else:
        meta = _last_state_nodes.blocks(dim, dstate)
        half = u.dtype in (torch.bfloat16, torch.float16)
        _last_state_nodes.last_state_nodes_kernel[(batch, triton.cdiv(dim, meta["BLOCK_E"]), splits)](
            u, delta, rates, coefficients, B, C, D, z, bias, lengths, y, saved, parts,
            batch, dim, dstate, seqlen, 0, *strides, **flags, LOW=not half, NODES=coefficients.shape[0], **meta,
        )  # fmt: skip
    if splits > 1:
        last_state_parts_kernel[(batch, triton.cdiv(dim, BLOCK_E))](
            parts, u, D, z, lengths, y, saved, dim, seqlen, *u.stride(), *z_strides,
            SPLITS=splits, HAS_LENGTHS=lengths is not None, HAS_D=D is not None, HAS_Z=z is not None, BLOCK_E=BLOCK_E,
            num_warps=4,
        )  # fmt: skip
    return y, saved


@torch.library.custom_op("fastm2rec::last_state", mutates_args=())
def _forward_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    lengths: Tensor | None,
    rates: Tensor | None,
    coefficients: Tensor | None,
    splits: int,
) -> tuple[Tensor, Tensor]:
    return launch_forward(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, lengths, rates, coefficients, splits
    )  # fmt: skip


@_forward_op.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, lengths, rates, coefficients, splits):
    batch, dim, _ = u.shape
    return u.new_empty(batch, dim), u.new_empty(batch, dim, dtype=compute_dtype(u, delta, A, B, C, D, z))


@torch.library.custom_op("fastm2rec::last_state_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    lengths: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = launch_backward(dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, lengths, saved)
    du, ddelta, dA, dB, dC, dD, dz, dbias = (u.new_empty(0) if x is None else x for x in found)
    return du, ddelta, dA, dB, dC, dD, dz, dbias


@_backward_op.register_fake
def _(dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, lengths, saved):
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    return (
        u.new_empty(batch, seqlen, dim),
        delta.new_empty(batch, seqlen, dim),
        A.new_empty(A.shape),
        B.new_empty(batch, seqlen, dstate),
        C.new_empty(C.shape),
        *(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (D, z, delta_bias)),
    )


def _save(ctx, inputs, output) -> None:
    u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, lengths, *_ = inputs
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, lengths, output[1])


def _backward(ctx, dy, _):
    u, delta, A, B, C, D, z, delta_bias, lengths, saved = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dD, dz, dbias = _backward_op(
        dy, u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, lengths, saved
    )
    optional = (None if x is None else dx for x, dx in ((D, dD), (z, dz), (delta_bias, dbias)))
    return (
        du.transpose(1, 2), ddelta.transpose(1, 2), dA, dB.transpose(1, 2), dC, *optional, *(None,) * 5,
    )  # fmt: skip


_forward_op.register_autograd(_backward, setup_context=_save)


def last_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    lengths: Tensor | None = None,
    exponentials: str = "exact",
    nodes: Nodes | None = None,
    splits: int = 1,
) -> Tensor:
    """As `fastm2rec.reference.last_state.last_state`, for at most 64 states.

    Raises:
        ValueError: nodes were asked for and there are none, or their error is too large; more than 64 states.
    """
    if A.shape[1] > 64:
        raise ValueError(f"A: expected at most 64 states in these kernels, got {A.shape[1]}")
    chosen = accepted(exponentials, nodes)
    rates, coefficients = (None, None) if chosen is None else (chosen.rates, chosen.coefficients)
    y, _ = _forward_op(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, lengths, rates, coefficients, splits
    )  # fmt: skip
    return y
