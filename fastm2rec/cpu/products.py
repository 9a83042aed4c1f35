"""Products with a basis behind custom ops, each the other's gradient: what `product_kernels.py` needs around it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import symmetry
from .arrays import as_flat
from .threads import run

# Elements of V from which its orbits are the faster way. On one thread and on two, at 256 rows of 64 channels, those of
# 100 x 21 take 1.1 times as long as V itself, those of 200 x 41 0.75 to 0.95 times. torch's own products take 1.3 to 2
# times as long as the faster one.
LEAST = 4000
MULTIPLY_ADDS = 2_000_000  # of a slice: about a tenth of a millisecond


class Products(NamedTuple):
    """A basis V [L, R] as the kernels read it."""

    basis: Tensor  # [orbits, columns], of the dtype of the products
    positions: Tensor  # [slots] int64
    source: Tensor  # [columns] int64
    seqlen: int
    kept: int  # R
    classes: int
    orbits: int


def pack(basis: Tensor, dtype: torch.dtype) -> Products:
    """Of V [L, R], for any number of products in `dtype`."""
    packed = symmetry.pack(basis[None].to(dtype), [len(basis)], 8)
    classes, orbits = packed.counts[0].tolist()
    seqlen, kept = basis.shape
    return Products(packed.basis[0], packed.positions[0], packed.columns[0], seqlen, kept, classes, orbits)


def as_arrays(products: Products | None, dim: int, dtype: torch.dtype) -> Any:
    """As `product_kernels.py` takes it, for `dim` channels; None as one without columns."""
    from . import product_kernels as kernels

    if products is None:
        empty = as_flat(None, torch.int64)
        return kernels.Products(as_flat(None, dtype), empty, empty, 0, 0, 0, 0, 0, dim)
    basis, positions, source, seqlen, kept, classes, orbits = products
    places, columns = as_flat(positions, torch.int64), as_flat(source, torch.int64)
    return kernels.Products(
        as_flat(basis, dtype), places, columns, seqlen, kept, classes, orbits, basis.shape[1], dim
    )  # fmt: skip


def _run(kernel: Any, x: Tensor, out: Tensor, products: Products, extra: int) -> Tensor:
    from . import product_kernels as kernels

    dtype, (batch, _, dim) = x.dtype, x.shape
    arrays = as_arrays(products, dim, dtype)
    arguments = (as_flat(x, dtype), arrays, as_flat(out, dtype), extra)
    grain = max(1, MULTIPLY_ADDS // (products.basis.numel() * dim))
    run(kernel, arguments, batch, grain, kernels.scratch_size(arrays), dtype)
    return out


@torch.library.custom_op("fastm2rec::cpu_contract", mutates_args=(), device_types="cpu")
def _contract_op(
    x: Tensor, basis: Tensor, positions: Tensor, source: Tensor, seqlen: int, kept: int, classes: int,
    orbits: int, extra: int,
) -> Tensor:  # fmt: skip
    from . import product_kernels as kernels

    out = x.new_empty(x.shape[0], kept + extra, x.shape[2])
    return _run(kernels.contracted, x, out, Products(basis, positions, source, seqlen, kept, classes, orbits), extra)


@torch.library.custom_op("fastm2rec::cpu_expand", mutates_args=(), device_types="cpu")
def _expand_op(
    bins: Tensor, basis: Tensor, positions: Tensor, source: Tensor, seqlen: int, kept: int, classes: int,
    orbits: int, extra: int,
) -> Tensor:  # fmt: skip
    from . import product_kernels as kernels

    out = bins.new_empty(bins.shape[0], seqlen, bins.shape[2])
    return _run(kernels.expanded, bins, out, Products(basis, positions, source, seqlen, kept, classes, orbits), extra)


@_contract_op.register_fake
def _(x, basis, positions, source, seqlen, kept, classes, orbits, extra):
    return x.new_empty(x.shape[0], kept + extra, x.shape[2])


@_expand_op.register_fake
def _(bins, basis, positions, source, seqlen, kept, classes, orbits, extra):
    return bins.new_empty(bins.shape[0], seqlen, bins.shape[2])


def _save(ctx, inputs, output) -> None:
    _, basis, positions, source, *ctx.sizes = inputs
    ctx.save_for_backward(basis, positions, source)


def _contract_backward(ctx, dy):
    return _expand_op(dy, *ctx.saved_tensors, *ctx.sizes), *[None] * 8


def _expand_backward(ctx, dy):
    return _contract_op(dy, *ctx.saved_tensors, *ctx.sizes), *[None] * 8


_contract_op.register_autograd(_contract_backward, setup_context=_save)
_expand_op.register_autograd(_expand_backward, setup_context=_save)


def _run_small(kernel: Any, x: Tensor, out: Tensor, basis: Tensor, extra: int) -> Tensor:
    dtype, (batch, _, dim), (seqlen, kept) = x.dtype, x.shape, basis.shape
    arrays = tuple(as_flat(tensor, dtype) for tensor in (x, basis, out))
    grain = max(1, MULTIPLY_ADDS // (seqlen * kept * dim))
    run(kernel, (*arrays, seqlen, kept, extra, dim), batch, grain, 0, dtype)
    return out


@torch.library.custom_op("fastm2rec::cpu_contract_small", mutates_args=(), device_types="cpu")
def _contract_small_op(x: Tensor, basis: Tensor, extra: int) -> Tensor:
    from . import product_kernels as kernels

    out = x.new_empty(x.shape[0], basis.shape[1] + extra, x.shape[2])
    return _run_small(kernels.contracted_small, x, out, basis, extra)


@torch.library.custom_op("fastm2rec::cpu_expand_small", mutates_args=(), device_types="cpu")
def _expand_small_op(bins: Tensor, basis: Tensor, extra: int) -> Tensor:
    from . import product_kernels as kernels

    out = bins.new_empty(bins.shape[0], len(basis), bins.shape[2])
    return _run_small(kernels.expanded_small, bins, out, basis, extra)


@_contract_small_op.register_fake
def _(x, basis, extra):
    return x.new_empty(x.shape[0], basis.shape[1] + extra, x.shape[2])


@_expand_small_op.register_fake
def _(bins, basis, extra):
    return bins.new_empty(bins.shape[0], basis.shape[0], bins.shape[2])


def _save_small(ctx, inputs, output) -> None:
    _, basis, ctx.extra = inputs
    ctx.save_for_backward(basis)


def _contract_small_backward(ctx, dy):
    return _expand_small_op(dy, *ctx.saved_tensors, ctx.extra), None, None


def _expand_small_backward(ctx, dy):
    return _contract_small_op(dy, *ctx.saved_tensors, ctx.extra), None, None


_contract_small_op.register_autograd(_contract_small_backward, setup_context=_save_small)
_expand_small_op.register_autograd(_expand_small_backward, setup_context=_save_small)


def contract(x: Tensor, basis: Tensor, products: Products, extra: int = 0) -> Tensor:
    """V^T x and behind it the last `extra` positions of x: [B, L, C] to [B, R + extra, C].

    V [L, R] as it is and as it is packed; x has its dtype.
    """
    whole, channels = _whole(x), x.shape[2]
    small = basis.numel() < LEAST
    found = _contract_small_op(whole, basis, extra) if small else _contract_op(whole, *products, extra)
    return found if channels == whole.shape[2] else found[..., :channels]


def expand(bins: Tensor, basis: Tensor, products: Products) -> Tensor:
    """V bins, [B, R, C] to [B, L, C], likewise."""
    whole, channels = _whole(bins), bins.shape[2]
    small = basis.numel() < LEAST
    found = _expand_small_op(whole, basis, 0) if small else _expand_op(whole, *products, 0)
    return found if channels == whole.shape[2] else found[..., :channels]


def _whole(x: Tensor) -> Tensor:
    """With its channels padded to whole Lanes, of which there are 16 or 32."""
    return F.pad(x, (0, -x.shape[2] % 32)) if x.shape[2] % 32 else x
