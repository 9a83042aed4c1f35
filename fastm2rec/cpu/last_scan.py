"""`last_scan` behind a custom op: what the kernels in `kernels.py` need around them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.selective_scan import compute_dtype
from .threads import run

# A slice should take about a tenth of a millisecond; an exponential takes half a nanosecond, with its surroundings one.
SLICE = 100_000  # exponentials


def _flat(x: Tensor | None, dtype: torch.dtype, like: Tensor):
    """As a flat contiguous array; None as an empty one."""
    return (like.new_empty(0, dtype=dtype) if x is None else x.detach().to(dtype).contiguous()).view(-1).numpy()


def _packed(dtype, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D):
    """The parameters as the kernels read them, and the three sizes."""
    from . import kernels

    sizes = (*A.shape, dt_proj_weight.shape[1])
    weights = torch.empty(kernels.weights_size(*sizes), dtype=dtype).numpy()
    transposed = torch.empty(kernels.transposed_size(*sizes), dtype=dtype).numpy()
    parameters = (_flat(x, dtype, A) for x in (x_proj_weight, dt_proj_weight, dt_proj_bias, A, D))
    kernels.pack(*parameters, weights, transposed, *sizes)
    return weights, transposed, sizes


def launch_forward(
    p: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    z: Tensor | None,
    lengths: Tensor,
    stride: int,
) -> Tensor:
    """y [B, E] in p's dtype."""
    from . import kernels

    batch, seqlen, dim = p.shape
    dtype = compute_dtype(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    weights, transposed, sizes = _packed(dtype, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D)
    y = torch.empty(batch, dim, dtype=dtype)
    arrays = (*(_flat(x, dtype, p) for x in (p,)), _flat(lengths, torch.int64, p), _flat(z, dtype, p), _flat(y, dtype, p))

    def rows(first: int, last: int) -> None:
        # torch's memory starts on a cache line, numpy's need not: half the speed.
        scratch = torch.empty(kernels.forward_scratch(*sizes), dtype=dtype).numpy()
        kernels.forward(
            *arrays, weights, transposed, scratch, first, last, seqlen, *sizes, stride, z is not None
        )  # fmt: skip

    run(rows, batch, _grain(seqlen, stride, A))
    return y.to(p.dtype)


def _grain(seqlen: int, stride: int, A: Tensor) -> int:
    return max(1, SLICE * stride // (seqlen * A.numel()))


def launch_backward(
    dy: Tensor,
    p: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    z: Tensor | None,
    lengths: Tensor,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of p, the five parameters and z; empty where there is no bias or no z."""
    from . import kernels

    batch, seqlen, dim = p.shape
    dtype = compute_dtype(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    weights, transposed, sizes = _packed(dtype, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D)
    groups = -(-batch // kernels.GROUP)
    dp = torch.empty(batch, seqlen, dim, dtype=dtype)
    dz = torch.empty((0,) if z is None else (batch, dim), dtype=dtype)
    sums = torch.empty(groups * weights.size, dtype=dtype).numpy()
    arrays = (
        _flat(p, dtype, p), _flat(lengths, torch.int64, p), _flat(z, dtype, p), _flat(dy, dtype, p), _flat(dp, dtype, p), _flat(dz, dtype, p)
    )  # fmt: skip

    def rows(first: int, last: int) -> None:
        scratch = torch.empty(kernels.backward_scratch(seqlen, *sizes, stride), dtype=dtype).numpy()
        kernels.backward(
            *arrays, sums, weights, transposed, scratch,
            first, last, batch, seqlen, *sizes, stride, z is not None,
        )  # fmt: skip

    run(rows, groups, max(1, _grain(seqlen, stride, A) // (2 * kernels.GROUP)))
    gradients = [
        torch.empty((0,) if x is None else x.shape, dtype=dtype)
        for x in (x_proj_weight, dt_proj_weight, dt_proj_bias, A, D)
    ]
    scratch = torch.empty(2 * weights.size, dtype=dtype).numpy()
    kernels.combine(sums, scratch, *(_flat(gradient, dtype, p) for gradient in gradients), *sizes)
    inputs = (p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    d_p, d_x, d_dt, d_bias, dA, dD, d_z = (
        gradient if x is None else gradient.to(x.dtype) for gradient, x in zip((dp, *gradients, dz), inputs, strict=True)
    )
    return d_p, d_x, d_dt, d_bias, dA, dD, d_z


@torch.library.custom_op("fastm2rec::cpu_last_scan", mutates_args=(), device_types="cpu")
def _forward_op(
    p: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    z: Tensor | None,
    lengths: Tensor,
    stride: int,
) -> Tensor:
    return launch_forward(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, lengths, stride)


@_forward_op.register_fake
def _(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, lengths, stride):
    return p.new_empty(p.shape[0], p.shape[2])


@torch.library.custom_op("fastm2rec::cpu_last_scan_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    dy: Tensor,
    p: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    z: Tensor | None,
    lengths: Tensor,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch_backward(dy, p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, lengths, stride)


@_backward_op.register_fake
def _(dy, p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, lengths, stride):
    dtype = compute_dtype(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    return tuple(
        p.new_empty(0, dtype=dtype) if x is None else x.new_empty(x.shape)
        for x in (p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    )


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.stride = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    *inputs, lengths = ctx.saved_tensors
    gradients = _backward_op(dy, *inputs, lengths, ctx.stride)
    return *(None if x is None else dx for x, dx in zip(inputs, gradients, strict=True)), None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def last_scan(
    p: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    z: Tensor | None,
    lengths: Tensor,
    stride: int = 1,
) -> Tensor:
    """As `fastm2rec.reference.last_scan.last_scan`, on the CPU."""
    return _forward_op(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, lengths, stride)
