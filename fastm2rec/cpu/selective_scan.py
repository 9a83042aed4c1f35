"""`selective_scan` behind a custom op: what the kernels need around them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.selective_scan import compute_dtype
from .arrays import as_flat
from .products import whole_lanes
from .threads import run

SLICE = 200_000  # exponentials: about a tenth of a millisecond
BLOCK = 16  # positions from one state that is kept to the next


def _sizes(u: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> tuple[Any, Any, Any, Any]:
    """Sequences, checkpoints, channels in whole Lanes, and states, an even number."""
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, u.shape[0] * u.shape[2] // BLOCK, -(-u.shape[1] // 32) * 32, -(-A.shape[1] // 2) * 2


def _starts(u: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each sequence's first of all rows' positions, and the end; nothing outside, whatever cu_seqlens says."""
    batch, _, seqlen = u.shape
    if cu_seqlens is None:
        return torch.arange(0, batch * seqlen + 1, seqlen)
    inner = cu_seqlens[1:-1].clamp(0, seqlen).long()
    return F.pad(F.pad(inner.cummax(0).values if len(inner) else inner, (1, 0)), (0, 1), value=seqlen)


def _states(x: Tensor, dim: int, dstate: int) -> Tensor:
    """(..., dim, dstate) as [..., dstate, dim], padded."""
    return F.pad(x.transpose(-1, -2), (0, dim - x.shape[-2], 0, dstate - x.shape[-1]))


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> Any:
    """The arguments as the kernels read them."""
    from . import selective_scan_kernels as kernels

    _, _, dim, dstate = _sizes(u, A, cu_seqlens)

    def channels(x: Tensor | None) -> Any:
        return as_flat(None if x is None else whole_lanes(x.transpose(1, 2)), dtype)

    def states(x: Tensor) -> Any:
        x = x.transpose(1, 2)
        return as_flat(F.pad(x, (0, 1)) if x.shape[2] % 2 else x, dtype)

    def vector(x: Tensor | None) -> Any:
        return as_flat(torch.zeros(dim) if x is None else F.pad(x, (0, dim - x.shape[0])), dtype)

    return kernels.Scan(
        channels(u), channels(delta), as_flat(_states(A.to(dtype) * math.log2(math.e), dim, dstate), dtype),
        states(B), states(C), vector(D), channels(z), vector(delta_bias),
        as_flat(None if initial_state is None else _states(initial_state, dim, dstate), dtype),
        as_flat(_starts(u, cu_seqlens), torch.int64), dim, dstate, delta_softplus,
    )  # fmt: skip


@torch.library.custom_op("fastm2rec::cpu_selective_scan", mutates_args=(), device_types="cpu")
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
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    last: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, L, dim]; the last states (sequences, dim, dstate) and what the gradient needs of others, or nothing."""
    from . import selective_scan_kernels as kernels

    dtype = compute_dtype(u, delta, A, B, C, D, z, initial_state)
    sequences, slots, dim, dstate = _sizes(u, A, cu_seqlens)
    scan = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, dtype)
    batch, channels, seqlen = u.shape
    y = torch.empty(batch, seqlen, dim, dtype=dtype)
    states = torch.empty(sequences if last else 0, dstate, dim, dtype=dtype)
    checkpoints = torch.empty(slots if keep else 0, dstate, dim, dtype=dtype)
    tiles = sequences * (dim // kernels.LANES)
    grain = max(1, SLICE * tiles // max(1, batch * seqlen * dim * dstate))
    arguments = (scan, *(as_flat(x, dtype) for x in (y, states, checkpoints)))
    run(kernels.forward, arguments, tiles, grain, kernels.forward_scratch(dstate), dtype)
    states = states[:, : A.shape[1], :channels].transpose(1, 2).contiguous()
    return y[..., :channels].to(u.dtype).contiguous(), states, checkpoints


@_forward_op.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, last, keep):
    batch, channels, seqlen = u.shape
    dtype = compute_dtype(u, delta, A, B, C, D, z, initial_state)
    sequences, slots, dim, dstate = _sizes(u, A, cu_seqlens)
    return (
        u.new_empty(batch, seqlen, channels),
        u.new_empty(sequences if last else 0, channels, A.shape[1], dtype=dtype),
        u.new_empty(slots if keep else 0, dstate, dim, dtype=dtype),
    )


@torch.library.custom_op("fastm2rec::cpu_selective_scan_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    dy: Tensor,
    dlast: Tensor | None,
    checkpoints: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the tensors, positions before channels and states; empty for what is absent. dy is as u."""
    from . import selective_scan_gradients as kernels

    dtype = checkpoints.dtype
    sequences, _, dim, dstate = _sizes(u, A, cu_seqlens)
    scan = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, dtype)
    batch, channels, seqlen = u.shape
    groups = -(-sequences // kernels.GROUP)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    du, ddelta, dz = (new(0 if x is None else batch, seqlen, dim) for x in (u, delta, z))
    dB, dC = new(batch, seqlen, dstate), new(batch, seqlen, dstate)
    dinitial = new(0 if initial_state is None else sequences, dstate, dim)
    sums = new(groups, dstate + 2, dim)
    given = as_flat(whole_lanes(dy.transpose(1, 2)), dtype)
    given_last = as_flat(None if dlast is None else _states(dlast, dim, dstate), dtype)
    into = (as_flat(x, dtype) for x in (du, ddelta, dz, dB, dC, dinitial, sums))
    grain = max(1, SLICE * groups // max(1, 2 * batch * seqlen * dim * dstate))
    arguments = (scan, as_flat(checkpoints, dtype), given, given_last, *into)
    run(kernels.backward, arguments, groups, grain, kernels.backward_scratch(dim, dstate), dtype)

    def gradient(value: Tensor, like: Tensor | None) -> Tensor:
        return value.new_empty(0) if like is None else value.to(like.dtype).contiguous()

    total = sums.sum(dim=0)[:, :channels]  # of which outputs may not be views
    dA = total[: A.shape[1]].t().clone(memory_format=torch.contiguous_format)
    dD, dbias = total[dstate].clone(), total[dstate + 1].clone()
    return (
        gradient(du[..., :channels], u), gradient(ddelta[..., :channels], delta), gradient(dA, A),
        gradient(dB[..., : A.shape[1]], B), gradient(dC[..., : A.shape[1]], C), gradient(dD, D),
        gradient(dz[..., :channels], z), gradient(dbias, delta_bias),
        gradient(dinitial[:, : A.shape[1], :channels].transpose(1, 2), initial_state),
    )  # fmt: skip


@_backward_op.register_fake
def _(dy, dlast, checkpoints, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens):
    def plain(x: Tensor | None) -> Tensor:
        return checkpoints.new_empty(0) if x is None else x.new_empty(x.shape)

    def swapped(x: Tensor | None) -> Tensor:
        return checkpoints.new_empty(0) if x is None else x.new_empty(x.shape[0], x.shape[2], x.shape[1])

    return (
        swapped(u), swapped(delta), plain(A), swapped(B), swapped(C), plain(D), swapped(z), plain(delta_bias),
        plain(initial_state),
    )  # fmt: skip


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.softplus, initial_state, cu_seqlens, ctx.last, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # none for what is kept
    ctx.save_for_backward(output[2], *tensors, initial_state, cu_seqlens)


def _backward(ctx, dy, dlast, _):
    checkpoints, *tensors, initial_state, cu_seqlens = ctx.saved_tensors
    inputs = (*tensors, ctx.softplus, initial_state, cu_seqlens)
    u = tensors[0]
    if checkpoints.shape[0] != _sizes(u, tensors[2], cu_seqlens)[1]:  # nobody had said that there would be gradients
        *_, checkpoints = _forward_op(*inputs, False, True)
    dy = torch.zeros_like(u) if dy is None else dy.transpose(1, 2)
    found = _backward_op(dy, dlast if ctx.last else None, checkpoints, *inputs)
    turned = [x.transpose(1, 2) if i in (0, 1, 3, 4, 6) and x.dim() == 3 else x for i, x in enumerate(found)]
    gradients = [None if x is None else dx for x, dx in zip((*tensors, initial_state), turned, strict=True)]
    return *gradients[:-1], None, gradients[-1], None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `fastm2rec.reference.selective_scan.selective_scan`, on the CPU."""
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tensors, initial_state))
    y, state, _ = _forward_op(*tensors, delta_softplus, initial_state, cu_seqlens, return_last_state, keep)
    y = y.transpose(1, 2)
    return (y, state) if return_last_state else y
