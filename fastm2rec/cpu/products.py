"""Products with a basis behind custom ops, each the other's gradient: what `product_kernels.py` needs around it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import symmetry
from .arrays import as_flat
from .threads import run

# Elements of V from which the kernels are faster than torch's products, on one thread and on two: at 256 rows, 50 x 11
# are 0.75 and 1.15 of torch's time, 70 x 15 are 0.8 and 0.83, 200 x 41 are 0.59 and 0.56.
LEAST = 1000
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


def contract(x: Tensor, basis: Tensor, products: Products, extra: int = 0) -> Tensor:
    """V^T x and behind it the last `extra` positions of x: [B, L, C] to [B, R + extra, C].

    V [L, R] as it is and as it is packed; x has its dtype.
    """
    if basis.numel() < LEAST:
        ends = F.pad(torch.eye(extra, dtype=basis.dtype), (0, 0, len(basis) - extra, 0))
        return torch.cat([basis, ends], dim=1).mT @ x
    channels = x.shape[2]
    return _contract_op(_whole(x), *products, extra)[..., :channels]


def expand(bins: Tensor, basis: Tensor, products: Products) -> Tensor:
    """V bins, [B, R, C] to [B, L, C], likewise."""
    if basis.numel() < LEAST:
        return basis @ bins
    channels = bins.shape[2]
    return _expand_op(_whole(bins), *products, 0)[..., :channels]


def _whole(x: Tensor) -> Tensor:
    """With its channels padded to whole Lanes, of which there are 16 or 32."""
    return F.pad(x, (0, -x.shape[2] % 32)) if x.shape[2] % 32 else x
