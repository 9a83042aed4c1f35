"""From x to a filter's coefficients and back: what the kernels in `coefficients_kernels.py` need around them.

With a pass for each product, and the tensors in between, a training step at 256 x 50 took 2 % longer (Intel Xeon, two
cores).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arrays import as_flat, scratch
from .fourier_conv import response_of
from .products import LEAST, MULTIPLY_ADDS, Products, as_arrays, whole_lanes
from .threads import run


def _filter(basis: Tensor, products: Products, conv_weight: Tensor, conv_bias: Tensor | None, channels: int) -> Any:
    from . import coefficients_kernels as kernels

    dtype, (dim, width) = conv_weight.dtype, conv_weight.shape
    response = response_of(*basis.shape, width, dtype) @ conv_weight.t()
    offsets = None if conv_bias is None else basis.sum(dim=0)
    return kernels.Filter(
        as_flat(basis, dtype), as_arrays(products, channels, dtype), basis.numel() < LEAST, as_flat(response, dtype),
        as_flat(conv_bias, dtype), as_flat(offsets, dtype), dim, width,
    )  # fmt: skip


def _grain(filter: Any) -> int:
    """Rows of the batch that are worth a slice."""
    products = filter.products
    work = (filter.basis.size + (products.kept + filter.width) * filter.dim) * products.dim
    return max(1, MULTIPLY_ADDS // work)


def launch_forward(
    x: Tensor, basis: Tensor, products: Products, weight: Tensor, bias: Tensor | None, ones: Tensor | None,
    conv_weight: Tensor, conv_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Any]:  # fmt: skip
    """e [B, R + width - 1, C], its channels padded to whole Lanes; h [B, R + width - 1, E]; c [B, R, E]; and what
    `launch_backward` takes."""
    from . import coefficients_kernels as kernels

    x, weight, dtype = whole_lanes(x), whole_lanes(weight), x.dtype
    (batch, _, channels), (dim, width), kept = x.shape, conv_weight.shape, basis.shape[1]
    filter = _filter(basis, products, conv_weight, conv_bias, channels)
    e = torch.empty(batch, kept + width - 1, channels, dtype=dtype)
    h, c = torch.empty(batch, kept + width - 1, dim, dtype=dtype), torch.empty(batch, kept, dim, dtype=dtype)
    with scratch(weight.numel(), dtype, "coefficients") as turned:
        kernels.turn(as_flat(weight, dtype), dim, channels, turned)
        arrays = (as_flat(tensor, dtype) for tensor in (bias, ones, e, h, c))
        arguments = (as_flat(x, dtype), filter, turned, *arrays)
        run(kernels.forward, arguments, batch, _grain(filter), kernels.row_scratch(filter), dtype)
    return e, h, c, filter


def launch_backward(
    dc: Tensor, h: Tensor, filter: Any, weight: Tensor, conv_weight: Tensor, basis: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dx, dh, and the gradients of conv_weight and of the convolution's bias, where it has one."""
    from . import coefficients_kernels as kernels

    padded, dtype, batch, has_bias = whole_lanes(weight), dc.dtype, len(dc), filter.bias.size > 0
    dx, dh = torch.empty(batch, len(basis), padded.shape[1], dtype=dtype), torch.empty_like(h)
    groups, response = -(-batch // kernels.GROUP), response_of(*basis.shape, conv_weight.shape[1], dtype)
    sums = torch.empty(groups, len(response) + has_bias, len(conv_weight), dtype=dtype)
    arrays = (as_flat(tensor, dtype) for tensor in (padded, dh, dx, sums))
    arguments = (as_flat(dc, dtype), as_flat(h, dtype), filter, *arrays, batch)
    grain = max(1, _grain(filter) // kernels.GROUP)
    run(kernels.backward, arguments, groups, grain, kernels.row_scratch(filter), dtype)
    total = sums.sum(0)
    dconv = total[: len(response)].t() @ response
    return dx[..., : weight.shape[1]], dh, dconv, total[-1] if has_bias else None
