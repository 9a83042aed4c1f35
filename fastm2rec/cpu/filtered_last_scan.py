"""`filtered_last_scan` on the CPU: the filter's coefficients go to the scan, which makes each row of them itself.

The scan skips what a whole tile of channels has forgotten, so it gets them in the order of their decay; that is done to
the weights.

With V the basis, e_k the last positions' unit vectors and S what the convolution does to frequencies
(`fourier_kernels.py`):

    h = (V, e)^T x W^T + b        c = S h + b_conv        p = V (m * c)        y = scan(p)

Every step's gradient is that of a product. The whole is one node of autograd's graph: a node for each step, with the
tensors in between, made a training step at 256 x 50 take 1 to 6 % longer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference.last_scan import slowest_first
from . import coefficients
from .arrays import as_flat
from .last_scan import last_scan, launch_backward, launch_forward, pack
from .products import Products
from .spectral_projection import fourier_products, spectral_projection


def filtered_last_scan(
    x: Tensor,
    lengths: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    z: Tensor | None,
    stride: int = 1,
) -> Tensor:
    """As `fastm2rec.reference.filtered_last_scan.filtered_last_scan`.

    Where it is not one node (another basis than Fourier's over all slots, other sizes than the kernels take, mixed
    dtypes, autocast, a mask of each row, a tracer's tensors) it is the two ops in turn.
    """
    tensors = (
        x, mask, weight, bias, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z
    )  # fmt: skip
    products = None
    if x.dtype in (torch.float32, torch.float64) and type(x) is Tensor and (mask is None or mask.dim() == 1):
        alike = all(tensor is None or tensor.dtype == x.dtype for tensor in (basis, *tensors))
        if alike and not torch.is_autocast_enabled("cpu"):
            products = fourier_products(basis, conv_weight, x.dtype)
    if products is not None:
        return _FilteredLastScan.apply(products, basis, lengths, stride, *tensors)
    order = slowest_first(A, dt_proj_bias)
    weight, conv_weight = weight[order], conv_weight[order]
    bias, conv_bias = (None if b is None else b[order] for b in (bias, conv_bias))
    p = spectral_projection(x, basis, mask, weight, bias, conv_weight=conv_weight, conv_bias=conv_bias, conv_first=True)
    return last_scan(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, lengths, stride, order)


def _taken(x: Any, order: Tensor) -> Any:
    """A tensor's channels in an order; None stays None."""
    return None if x is None else x.index_select(0, order)


def _put_back(x: Any, order: Tensor) -> Any:
    """The other way."""
    return None if x is None else torch.empty_like(x).index_copy_(0, order, x)


class _FilteredLastScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, products: Products, basis: Tensor, lengths: Tensor, stride: int, x: Tensor, mask: Tensor | None,
        weight: Tensor, bias: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor,
        dt_proj: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor, z: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if mask is not None and not mask.requires_grad and (as_flat(mask, x.dtype) == 1).all():
            mask = None  # of a hard mask, whose other columns the basis does not have
        extra, order = conv_weight.shape[1] - 1, slowest_first(A, dt_bias)
        w, bias, conv_weight, conv_bias = (_taken(t, order) for t in (weight, bias, conv_weight, conv_bias))
        ones = None if bias is None else _ones(basis, extra)
        e, h, c, filter = coefficients.launch_forward(x, basis, products, w, bias, ones, conv_weight, conv_bias)
        m = c if mask is None else c * mask[:, None]
        packed = pack(x_proj, dt_proj, dt_bias, A, D, x.dtype, order)
        keep = any(ctx.needs_input_grad)
        y, low_rank = launch_forward(m, packed, z, lengths, stride, keep, products)
        if keep:
            kept_c = c if mask is not None and mask.requires_grad else None
            ctx.save_for_backward(basis, lengths, order, mask, w, conv_weight, z, e, h, kept_c, m, low_rank)
            ctx.rest = (products, filter, stride, packed, extra, bias is not None, dt_bias is not None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        basis, lengths, order, mask, weight, conv_weight, z, e, h, c, m, low_rank = ctx.saved_tensors
        products, filter, stride, packed, extra, has_bias, has_dt_bias = ctx.rest
        dm, dx_proj, ddt_proj, ddt_bias, dA, dD, dz = launch_backward(
            dy, low_rank, m, packed, has_dt_bias, z, lengths, stride, products
        )
        dmask = None if c is None else torch.einsum("bre,bre->r", dm, c)
        dc = dm if mask is None else dm * mask[:, None]
        dx, dh, dconv, dconv_bias = coefficients.launch_backward(dc, h, filter, weight, conv_weight, basis)
        dbias = _ones(basis, extra) @ dh.sum(dim=0) if has_bias else None
        dweight = (dh.flatten(0, 1).mT @ e.flatten(0, 1))[:, : weight.shape[1]]
        put_back = [_put_back(t, order) for t in (dweight, dbias, dconv, dconv_bias)]
        scanned = (dx_proj, ddt_proj, ddt_bias if has_dt_bias else None, dA, dD, None if z is None else dz)
        return None, None, None, None, dx, dmask, *put_back, *scanned


def _ones(basis: Tensor, extra: int) -> Tensor:
    """V^T 1 and what the last positions have of it."""
    return F.pad(basis.sum(dim=0), (0, extra), value=1.0)
