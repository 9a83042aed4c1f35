"""Products with a basis behind custom ops, each the other's gradient: what `product_kernels.py` needs around it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import symmetry
from .arrays import as_flat
from .threads import run

# Elements of V from which its orbits are the faster way. On one thread of an Intel Xeon, at 128 channels, those of
# 50 x 11 take 1.1 to 1.3 times as long as V itself, of 100 x 21 0.8 to 0.95, of 200 x 41 0.6 to 0.65 times. Torch's own
# products take 0.7 to 0.8, 0.9 to 1.0 and 1.5 times as long as the faster of the two.
LEAST = 2000
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


def launch_contract(x: Tensor, basis: Tensor, products: Products, extra: int) -> Tensor:
    """`contract` without its gradient; C is whole Lanes."""
    from . import product_kernels as kernels

    out = x.new_empty(x.shape[0], basis.shape[1] + extra, x.shape[2])
    small = basis.numel() < LEAST
    _run(kernels.contracted_small if small else kernels.contracted, small, x, basis, products, extra, out)
    return out


def launch_expand(bins: Tensor, basis: Tensor, products: Products, extra: int) -> Tensor:
    """The gradient of `launch_contract`: [B, R + extra, C] to [B, L, C]."""
    from . import product_kernels as kernels

    out = bins.new_empty(bins.shape[0], basis.shape[0], bins.shape[2])
    small = basis.numel() < LEAST
    _run(kernels.expanded_small if small else kernels.expanded, small, bins, basis, products, extra, out)
    return out


def _run(kernel: Any, small: bool, x: Tensor, basis: Tensor, products: Products, extra: int, out: Tensor) -> None:
    from . import product_kernels as kernels

    dtype, (batch, _, dim) = x.dtype, x.shape
    ends = as_flat(x, dtype), as_flat(out, dtype)
    grain = max(1, MULTIPLY_ADDS // (basis.numel() * dim))
    if small:
        run(kernel, (*ends, as_flat(basis, dtype), *basis.shape, extra, dim), batch, grain, 0, dtype)
    else:
        arrays = as_arrays(products, dim, dtype)
        run(kernel, (*ends, arrays, extra), batch, grain, kernels.scratch_size(arrays), dtype)


@torch.library.custom_op("fastm2rec::cpu_contract", mutates_args=(), device_types="cpu")
def _contract_op(
    x: Tensor, whole: Tensor, basis: Tensor, positions: Tensor, source: Tensor, sizes: list[int], extra: int
) -> Tensor:
    return launch_contract(x, whole, Products(basis, positions, source, *sizes), extra)


@torch.library.custom_op("fastm2rec::cpu_expand", mutates_args=(), device_types="cpu")
def _expand_op(
    bins: Tensor, whole: Tensor, basis: Tensor, positions: Tensor, source: Tensor, sizes: list[int], extra: int
) -> Tensor:
    return launch_expand(bins, whole, Products(basis, positions, source, *sizes), extra)


@_contract_op.register_fake
def _(x, whole, basis, positions, source, sizes, extra):
    return x.new_empty(x.shape[0], whole.shape[1] + extra, x.shape[2])


@_expand_op.register_fake
def _(bins, whole, basis, positions, source, sizes, extra):
    return bins.new_empty(bins.shape[0], whole.shape[0], bins.shape[2])


def _save(ctx, inputs, output) -> None:
    _, *tensors, ctx.sizes, ctx.extra = inputs
    ctx.save_for_backward(*tensors)


def _contract_backward(ctx, dy):
    return _expand_op(dy, *ctx.saved_tensors, ctx.sizes, ctx.extra), *[None] * 6


def _expand_backward(ctx, dy):
    return _contract_op(dy, *ctx.saved_tensors, ctx.sizes, ctx.extra), *[None] * 6


_contract_op.register_autograd(_contract_backward, setup_context=_save)
_expand_op.register_autograd(_expand_backward, setup_context=_save)


def contract(x: Tensor, basis: Tensor, products: Products, extra: int = 0) -> Tensor:
    """V^T x and behind it the last `extra` positions of x: [B, L, C] to [B, R + extra, C].

    V [L, R] as it is and as it is packed; x has its dtype.
    """
    channels = x.shape[2]
    return _contract_op(whole_lanes(x), basis, *products[:3], products[3:], extra)[..., :channels]


def expand(bins: Tensor, basis: Tensor, products: Products) -> Tensor:
    """V bins, [B, R, C] to [B, L, C], likewise."""
    channels = bins.shape[2]
    return _expand_op(whole_lanes(bins), basis, *products[:3], products[3:], 0)[..., :channels]


def whole_lanes(x: Tensor) -> Tensor:
    """With its channels padded to whole Lanes, of which there are 16 or 32."""
    return F.pad(x, (0, -x.shape[-1] % 32)) if x.shape[-1] % 32 else x
