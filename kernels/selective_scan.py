"""The selective scan at all positions: two custom ops, joined for autograd, and the public function.

The forward and the backward kernel are in the two files beside this one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import compute_dtype
from ._selective_scan_backward import backward
from ._selective_scan_forward import block_states, forward, n_checkpoints, state_width

MAX_DSTATE = 256  # more states of a channel do not fit into registers without spilling


@torch.library.custom_op("fastm2rec::selective_scan", mutates_args=())
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
    save_last_state: bool,
    save_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens,
                   save_last_state, save_checkpoints)  # fmt: skip


@_scan.register_fake
def _(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save_last_state, save_checkpoints
):  # fmt: skip
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    dtype = compute_dtype(u, delta, A, B, C, D, z, initial_state)
    n_sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = n_checkpoints(batch, seqlen, cu_seqlens) if save_checkpoints else 0
    state = block_states(dstate), state_width(dim)
    return (
        u.new_empty(batch, seqlen, dim).transpose(1, 2),
        u.new_empty(n_sequences if save_last_state else 0, *state, dtype=dtype).transpose(1, 2)[:, :dim, :dstate],
        u.new_empty(slots, *state, dtype=dtype),
    )  # fmt: skip


@torch.library.custom_op("fastm2rec::selective_scan_backward", mutates_args=())
def _scan_backward(
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
    checkpoints: Tensor,
    dy: Tensor,
    dlast_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens,
                    checkpoints, dy, dlast_state)  # fmt: skip


@_scan_backward.register_fake
def _(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, checkpoints, dy, dlast_state
):  # fmt: skip
    def swapped(like: Tensor | None) -> Tensor:
        return u.new_empty(0) if like is None else like.new_empty(like.transpose(-1, -2).shape).transpose(-1, -2)

    def plain(like: Tensor | None) -> Tensor:
        return u.new_empty(0) if like is None else like.new_empty(like.shape)

    return (
        swapped(u), swapped(delta), plain(A), swapped(B), swapped(C),
        plain(D), swapped(z), plain(delta_bias), plain(initial_state),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, initial_state, cu_seqlens, ctx.has_last_state, _ = inputs
    checkpoints = output[2]
    ctx.set_materialize_grads(False)  # none for the checkpoints, which are large
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, checkpoints)


def _backward(ctx: Any, dy: Tensor | None, dlast_state: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, checkpoints = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(u)
    optional = (D, z, delta_bias, initial_state)
    du, ddelta, dA, dB, dC, *rest = torch.ops.fastm2rec.selective_scan_backward(
        u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, initial_state, cu_seqlens, checkpoints, dy,
        dlast_state if ctx.has_last_state else None,
    )  # fmt: skip
    dD, dz, dbias, dinitial = (g if t is not None else None for g, t in zip(rest, optional, strict=True))
    return du, ddelta, dA, dB, dC, dD, dz, dbias, None, dinitial, None, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)


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
    """As `reference.selective_scan.selective_scan`, in Triton.

    Raises:
        ValueError: more than 256 states a channel.
    """
    if A.shape[1] > MAX_DSTATE:
        raise ValueError(f"A: expected a d_state (its second axis) of at most {MAX_DSTATE}, got {A.shape[1]}")
    leaves = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    training = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    y, last_state, _ = torch.ops.fastm2rec.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, return_last_state, training
    )
    return (y, last_state) if return_last_state else y
