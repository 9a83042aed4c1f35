"""A Mamba-1 block whose filter sits behind its convolution, from the block's input to the scan at the last position.

p = V (m * V^T conv(x W^T + b))  (`spectral_projection.py`)        y = scan(silu(p)) at the last position, gated
                                                                   (`last_scan.py`)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .last_scan import last_scan
from .spectral_projection import spectral_projection


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
    *,
    project: Callable[..., Tensor] = spectral_projection,
    scan: Callable[..., Tensor] = last_scan,
) -> Tensor:
    """y [B, E] in x's dtype; `project` and `scan` compute the two steps."""
    p = project(x, basis, mask, weight, bias, conv_weight=conv_weight, conv_bias=conv_bias, conv_first=True)
    return scan(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, lengths, stride)
