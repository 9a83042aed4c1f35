"""`filtered_last_scan` on the CPU: the filter's coefficients go to the scan, which makes each row of them itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.filtered_last_scan import filtered_last_scan as composed
from .last_scan import last_scan
from .spectral_projection import fourier_bins, fourier_products, spectral_projection


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
    order: Tensor | None = None,
) -> Tensor:
    """As `fastm2rec.reference.filtered_last_scan.filtered_last_scan`."""
    scanned = (x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    products = fourier_products(basis, conv_weight, torch.promote_types(x.dtype, torch.float32))
    if products is None:
        return composed(
            x, lengths, basis, mask, weight, bias, conv_weight, conv_bias, *scanned, stride, order,
            project=spectral_projection, scan=last_scan,
        )  # fmt: skip
    bins = fourier_bins(products, x, basis, mask, weight, bias, conv_weight, conv_bias)
    return last_scan(bins, *scanned, lengths, stride, order, products).to(x.dtype)
