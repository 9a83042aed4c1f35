"""`last_scan` behind a custom op: what the kernels in `kernels.py` need around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..reference.selective_scan import compute_dtype
from .arrays import as_flat, empty_array, scratch
from .threads import run

if TYPE_CHECKING:
    import numpy as np

# A slice should take about a tenth of a millisecond; an exponential, with its surroundings, takes half a nanosecond.
SLICE = 200_000  # exponentials


class Packed(NamedTuple):
    """The parameters as the kernels read them. They are copies."""

    weights: np.ndarray
    transposed: np.ndarray
    dim: int
    dstate: int
    dt_rank: int
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.dim, self.dstate, self.dt_rank


def pack(
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dtype: torch.dtype,
) -> Packed:
    """The parameters, packed for any number of calls in `dtype`, float32 or float64."""
    from . import parts

    sizes = (A.shape[0], A.shape[1], dt_proj_weight.shape[1])
    weights = empty_array(parts.weights_size(*sizes), dtype)
    transposed = empty_array(parts.transposed_size(*sizes), dtype)
    parameters = (as_flat(x, dtype) for x in (x_proj_weight, dt_proj_weight, dt_proj_bias, A, D))
    parts.pack(*parameters, weights, transposed, *sizes)
    return Packed(weights, transposed, *sizes, dtype)


def grain(packed: Packed, seqlen: int, stride: int) -> int:
    """Rows of the batch that are worth a slice."""
    return max(1, SLICE * stride // (seqlen * packed.dim * packed.dstate))


def launch_forward(p: Tensor, packed: Packed, z: Tensor | None, lengths: Tensor, stride: int) -> Tensor:
    """y [B, E] in p's dtype."""
    from . import kernels

    batch, seqlen, dim = p.shape
    dtype, sizes = packed.dtype, packed.sizes
    y = torch.empty(batch, dim, dtype=dtype)
    arrays = (as_flat(p, dtype), as_flat(lengths, torch.int64), as_flat(z, dtype), as_flat(y, dtype))

    def rows(first: int, last: int) -> None:
        with scratch(kernels.forward_scratch(*sizes), dtype) as memory:
            kernels.forward(
                *arrays, packed.weights, packed.transposed, memory, first, last, seqlen, *sizes, stride, z is not None
            )

    run(rows, batch, grain(packed, seqlen, stride))
    return y.to(p.dtype)


def launch_backward(
    dy: Tensor, p: Tensor, packed: Packed, has_bias: bool, z: Tensor | None, lengths: Tensor, stride: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of p, of x_proj's weight, dt_proj's weight and bias, A and D, and of z, in packed's dtype.

    Empty where there is no bias or no z.
    """
    from . import kernels

    batch, seqlen, dim = p.shape
    dtype, sizes = packed.dtype, packed.sizes
    _, dstate, dt_rank = sizes
    dp = torch.empty(batch, seqlen, dim, dtype=dtype)
    dz = torch.empty((0,) if z is None else (batch, dim), dtype=dtype)
    groups = -(-batch // kernels.GROUP)
    sums = empty_array(groups * packed.weights.size, dtype)
    arrays = (as_flat(p, dtype), as_flat(lengths, torch.int64), *(as_flat(x, dtype) for x in (z, dy, dp, dz)))

    def rows(first: int, last: int) -> None:
        with scratch(kernels.backward_scratch(seqlen, *sizes, stride), dtype) as memory:
            kernels.backward(
                *arrays, sums, packed.weights, packed.transposed, memory,
                first, last, batch, seqlen, *sizes, stride, z is not None,
            )  # fmt: skip

    run(rows, groups, max(1, grain(packed, seqlen, stride) // (2 * kernels.GROUP)))
    d_x_proj = torch.empty(dt_rank + 2 * dstate, dim, dtype=dtype)
    d_dt_proj = torch.empty(dim, dt_rank, dtype=dtype)
    d_bias = torch.empty(dim if has_bias else 0, dtype=dtype)
    dA, dD = torch.empty(dim, dstate, dtype=dtype), torch.empty(dim, dtype=dtype)
    kernels.combine(
        sums, empty_array(2 * packed.weights.size, dtype),
        *(as_flat(x, dtype) for x in (d_x_proj, d_dt_proj, d_bias, dA, dD)), *sizes,
    )  # fmt: skip
    return dp, d_x_proj, d_dt_proj, d_bias, dA, dD, dz


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
    dtype = compute_dtype(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    packed = pack(x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, dtype)
    return launch_forward(p, packed, z, lengths, stride)


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
    inputs = (p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    packed = pack(x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, compute_dtype(*inputs))
    found = launch_backward(dy, p, packed, dt_proj_bias is not None, z, lengths, stride)
    d_p, d_x, d_dt, d_bias, dA, dD, dz = (
        dx if x is None else dx.to(x.dtype) for dx, x in zip(found, inputs, strict=True)
    )
    return d_p, d_x, d_dt, d_bias, dA, dD, dz


@_backward_op.register_fake
def _(dy, p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, lengths, stride):
    inputs = (p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    dtype = compute_dtype(*inputs)
    return tuple(p.new_empty(0, dtype=dtype) if x is None else x.new_empty(x.shape) for x in inputs)


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
