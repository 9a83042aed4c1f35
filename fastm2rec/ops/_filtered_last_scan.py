"""A Mamba block's filter and scan in one op, for the last position."""

from __future__ import annotations

import torch
from torch import Tensor

from ..impl import AUTO, resolve
from ._checks import expect_alike, expect_lengths, expect_shape
from ._last_scan import expect_scan, expect_stride


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
    impl: str = AUTO,
) -> Tensor:
    """`last_scan` of `spectral_projection` with the filter behind the convolution: x in, y at the last position out.

    On a CPU, with the Fourier basis over all slots, nothing of shape [B, L, E] is made: a row's p and its gradient stay
    in the cache.

    Args:
        x: [B, L, C].
        lengths: [B] integers, 1 to L.
        basis, mask, weight, bias, conv_weight, conv_bias: as of `spectral_projection` with `conv_first`; basis [L, R]
            or [B, L, R], mask [R] or [B, R] or None, weight [E, C], conv_weight [E, width], biases [E] or None.
        x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, stride: as of `last_scan`.
        impl: which implementation.

    Returns:
        y [B, E], dtype of x.

    Raises:
        TypeError, ValueError: as the two ops; the message names the argument.
        ImplementationError: `impl` cannot run here.

    Source: arXiv 2505.04445 Eqs. 10 to 13 and arXiv 2312.00752 Algorithm 2, in closed form.
    """
    expect_alike("x", x, {"basis": basis, "mask": mask, "weight": weight, "bias": bias, "conv_weight": conv_weight,
                           "conv_bias": conv_bias, "x_proj_weight": x_proj_weight, "dt_proj_weight": dt_proj_weight,
                           "dt_proj_bias": dt_proj_bias, "A": A, "D": D, "z": z})  # fmt: skip
    sizes: dict[str, int] = {}
    expect_shape("x", x, ("B", "L", "C"), sizes)
    expect_shape("basis", basis, ("L", "R") if basis.dim() == 2 else ("B", "L", "R"), sizes)
    if basis.requires_grad and torch.is_grad_enabled():
        raise ValueError("basis: expected data, got a tensor that requires a gradient")
    if mask is not None:
        expect_shape("mask", mask, ("R",) if mask.dim() == 1 else ("B", "R"), sizes)
    expect_shape("weight", weight, ("E", "C"), sizes)
    expect_shape("conv_weight", conv_weight, ("E", "width"), sizes)
    for name, vector in (("bias", bias), ("conv_bias", conv_bias)):
        if vector is not None:
            expect_shape(name, vector, ("E",), sizes)
    expect_scan(x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, sizes)
    if sizes["L"] == 0:
        raise ValueError("x: expected an L of at least 1, got 0")
    expect_stride(stride)
    expect_lengths(lengths, sizes["B"], sizes["L"], x)
    function = resolve("filtered_last_scan", impl, x.device)
    return function(
        x, lengths, basis, mask, weight, bias, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A,
        D, z, stride,
    )  # fmt: skip
