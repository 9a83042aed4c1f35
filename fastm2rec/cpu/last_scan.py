"""`last_scan` behind a custom op: what the kernels need around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..reference.selective_scan import compute_dtype
from .arrays import as_flat, empty_array
from .products import Products, as_arrays
from .threads import run

if TYPE_CHECKING:
    import numpy as np

# A slice should take about a tenth of a millisecond; an exponential, with its surroundings, takes half a nanosecond.
SLICE = 200_000  # exponentials


class Packed(NamedTuple):
    """The parameters as the kernels read them. They are copies."""

    weights: np.ndarray
    transposed: np.ndarray
    order: np.ndarray
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
    order: Tensor | None = None,
) -> Packed:
    """The parameters, packed for any number of calls in `dtype`, float32 or float64.

    Channel e of the kernels is channel order[e] of the parameters; None for the same.
    """
    from . import parts

    sizes = (A.shape[0], A.shape[1], dt_proj_weight.shape[1])
    weights = empty_array(parts.weights_size(*sizes), dtype)
    transposed = empty_array(parts.transposed_size(*sizes), dtype)
    parameters = (as_flat(x, dtype) for x in (x_proj_weight, dt_proj_weight, dt_proj_bias, A, D))
    places = as_flat(torch.arange(sizes[0]) if order is None else order, torch.int64)
    parts.pack(*parameters, places, weights, transposed, *sizes)
    return Packed(weights, transposed, places, *sizes, dtype)


def grain(packed: Packed, seqlen: int, stride: int) -> int:
    """Rows of the batch that are worth a slice."""
    return max(1, SLICE * stride // (seqlen * packed.dim * packed.dstate))


def launch_forward(
    p: Tensor, packed: Packed, z: Tensor | None, lengths: Tensor, stride: int, keep: bool,
    products: Products | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, E] in p's dtype; and delta and B as the gradient takes them, or nothing.

    p is [B, L, E] or, with the products of a basis V [L, R], the coefficients [B, R, E] of V p.
    """
    from . import last_scan_kernels as kernels

    (batch, _, dim), seqlen = p.shape, _seqlen(p, products)
    dtype, sizes = packed.dtype, packed.sizes
    basis = as_arrays(products, dim, dtype)
    y = torch.empty(batch, dim, dtype=dtype)
    low_rank = torch.empty(_low_rank_shape(batch, seqlen, *sizes[1:], stride, keep), dtype=dtype)
    arrays = (as_flat(p, dtype), basis, as_flat(lengths, torch.int64), *(as_flat(x, dtype) for x in (z, y, low_rank)))
    arguments = (*arrays, packed.order, packed.weights, packed.transposed, seqlen, *sizes, stride, z is not None)
    size = kernels.forward_scratch(basis, *sizes)
    run(kernels.forward, arguments, batch, grain(packed, seqlen, stride), size, dtype)
    return y.to(p.dtype), low_rank


def _seqlen(p: Tensor, products: Products | None) -> int:
    return p.shape[1] if products is None else products.seqlen


def _low_rank_shape(batch: int, seqlen: int, dstate: int, dt_rank: int, stride: int, keep: bool) -> tuple[int, ...]:
    return (batch, -(-seqlen // stride), dt_rank + dstate) if keep else (0,)


def launch_backward(
    dy: Tensor,
    low_rank: Tensor,
    p: Tensor,
    packed: Packed,
    has_bias: bool,
    z: Tensor | None,
    lengths: Tensor,
    stride: int,
    products: Products | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of p, of x_proj's weight, dt_proj's weight and bias, A and D, and of z, in packed's dtype.

    Empty where there is no bias or no z.
    """
    from . import last_scan_gradients as kernels

    (batch, _, dim), seqlen = p.shape, _seqlen(p, products)
    dtype, sizes = packed.dtype, packed.sizes
    basis = as_arrays(products, dim, dtype)
    _, dstate, dt_rank = sizes
    dp = torch.empty(p.shape, dtype=dtype)
    dz = torch.empty((0,) if z is None else (batch, dim), dtype=dtype)
    group = kernels.rows_of_group(batch)
    groups = -(-batch // group)
    sums = empty_array(groups * packed.weights.size, dtype)
    arrays = (as_flat(p, dtype), basis, as_flat(lengths, torch.int64), *(as_flat(x, dtype) for x in (z, dy, low_rank)))
    arguments = (
        *arrays, packed.order, as_flat(dp, dtype), as_flat(dz, dtype), sums, packed.weights, packed.transposed, batch,
        group, seqlen, *sizes, stride, z is not None,
    )  # fmt: skip
    size = kernels.backward_scratch(basis, seqlen, *sizes, stride)
    run(kernels.backward, arguments, groups, max(1, grain(packed, seqlen, stride) // (2 * group)), size, dtype)
    d_x_proj = torch.empty(dt_rank + 2 * dstate, dim, dtype=dtype)
    d_dt_proj = torch.empty(dim, dt_rank, dtype=dtype)
    d_bias = torch.empty(dim if has_bias else 0, dtype=dtype)
    dA, dD = torch.empty(dim, dstate, dtype=dtype), torch.empty(dim, dtype=dtype)
    kernels.combine(
        sums, empty_array(2 * packed.weights.size, dtype), packed.order,
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
    order: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    packed = pack(x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, dtype, order)
    return launch_forward(p, packed, z, lengths, stride, keep)


@_forward_op.register_fake
def _(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, lengths, stride, order, keep):
    dtype = compute_dtype(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    shape = _low_rank_shape(p.shape[0], p.shape[1], A.shape[1], dt_proj_weight.shape[1], stride, keep)
    return p.new_empty(p.shape[0], p.shape[2]), p.new_empty(shape, dtype=dtype)


@torch.library.custom_op("fastm2rec::cpu_last_scan_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    dy: Tensor,
    low_rank: Tensor,
    p: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    z: Tensor | None,
    lengths: Tensor,
    stride: int,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    packed = pack(x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, compute_dtype(*inputs), order)
    found = launch_backward(dy, low_rank, p, packed, dt_proj_bias is not None, z, lengths, stride)
    d_p, d_x, d_dt, d_bias, dA, dD, dz = (
        dx if x is None else dx.to(x.dtype) for dx, x in zip(found, inputs, strict=True)
    )
    return d_p, d_x, d_dt, d_bias, dA, dD, dz


@_backward_op.register_fake
def _(dy, low_rank, p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, *_):
    inputs = (p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    dtype = compute_dtype(*inputs)
    return tuple(p.new_empty(0, dtype=dtype) if x is None else x.new_empty(x.shape) for x in inputs)


def _save(ctx, inputs, output) -> None:
    *tensors, lengths, ctx.stride, order, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors, lengths, order)


def _backward(ctx, dy, _):
    low_rank, *inputs, lengths, order = ctx.saved_tensors
    rest = (lengths, ctx.stride, order)
    if low_rank.shape[0] != lengths.shape[0]:  # nobody had said that there would be gradients
        _, low_rank = _forward_op(*inputs, *rest, True)
    gradients = _backward_op(dy, low_rank, *inputs, *rest)
    gradients = (None if x is None else dx for x, dx in zip(inputs, gradients, strict=True))
    return *gradients, *[None] * (len(rest) + 1)


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
    order: Tensor | None = None,
) -> Tensor:
    """As `fastm2rec.reference.last_scan.last_scan`, on the CPU."""
    tensors = (p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _forward_op(*tensors, lengths, stride, order, keep)[0]
