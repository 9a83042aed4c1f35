"""Arguments of the scan at all positions, and what an implementation makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
OPTIONAL = ("D", "z", "delta_bias", "initial_state")


def scan_arguments(
    batch: int,
    seqlen: int,
    dim: int,
    dstate: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
    cu_seqlens: list[int] | None = None,
) -> Arguments:
    """As the model calls it: views into the projections' outputs, channels side by side, and A, D, bias in float32."""

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    n_sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    u, z = r(batch, seqlen, 2 * dim).to(dtype).transpose(1, 2).chunk(2, dim=1)
    _, B, C = r(batch, seqlen, 4 + 2 * dstate).to(dtype).transpose(1, 2).split([4, dstate, dstate], dim=1)
    delta = r(batch, seqlen, dim).to(dtype).transpose(1, 2)
    arguments = {
        "u": u, "delta": delta, "A": -r(dim, dstate).exp(), "B": B, "C": C, "D": r(dim), "z": z, "delta_bias": r(dim),
        "delta_softplus": "delta_softplus" not in without, "initial_state": r(n_sequences, dim, dstate),
        "cu_seqlens": None if cu_seqlens is None else torch.tensor(cu_seqlens, device=device),
    }  # fmt: skip
    if not arguments["delta_softplus"]:
        arguments["delta"] = torch.rand_like(delta)
    return {**arguments, **dict.fromkeys(set(OPTIONAL) & set(without))}


def in_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return {
        name: value.to(dtype, memory_format=torch.preserve_format)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def results(op: Callable[..., Any], arguments: Arguments, dy: Tensor, dlast: Tensor) -> dict[str, Tensor]:
    """y, the last state and the gradient of every floating-point argument."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    y, last_state = op(**{**arguments, **leaves}, return_last_state=True)
    grads = torch.autograd.grad((y, last_state), list(leaves.values()), (dy.to(y.dtype), dlast.to(last_state.dtype)))
    return {"y": y.detach(), "last_state": last_state.detach(), **dict(zip(leaves, grads, strict=True))}


def gradients_of_outputs(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Some gradients of y and of the last state."""
    u, A, cu_seqlens = arguments["u"], arguments["A"], arguments["cu_seqlens"]
    n_sequences = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return torch.randn_like(u), torch.randn(n_sequences, *A.shape, device=u.device)
