"""The filter with what lies next to it, as a projection and by fast transforms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..impl import AUTO, resolve
from ._autocast import as_autocast
from ._checks import expect_alike, expect_shape

# From this many basis columns on, `spectral_projection_fft` should be the faster one for the padded Fourier spectrum.
# An estimate until it is measured: a column costs 2 (C + C_out) operations a position on tensor cores, the transforms a
# fixed number of float32 trips through memory, and at 64 to 256 channels the two meet near here.
FFT_COLUMNS = 1024


def spectral_projection(
    x: Tensor,
    basis: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    conv_first: bool = False,
    activation: Literal["silu"] | None = None,
    impl: str = AUTO,
) -> Tensor:
    """A filter in the span of a basis, with the Linear and the causal convolution next to it folded in.

    With `filter(x) = V (m * (V^T x))`: `y = act(conv(filter(x) W^T + b))`, or with `conv_first`
    `y = act(filter(conv(x W^T + b)))`. The convolution, the Linear and the activation may be left out.

    Args:
        x: [B, L, C].
        basis: V, [L, R] for all rows or [B, L, R], columns orthonormal or zero. It is data: it gets no gradient.
        mask: m, the gain of each column: [R], [B, R] or, a gain for each filtered channel, [R, C] ([R, C_out] with
            `conv_first`); None is 1. Where B = R, a square mask counts as [B, R].
        weight: W, [C_out, C], as in `torch.nn.Linear`; without it C_out = C.
        bias: b, [C_out]; needs `weight`.
        conv_weight: [C_out, width], the taps of `causal_conv1d`; None leaves the convolution out.
        conv_bias: [C_out]; needs `conv_weight`.
        conv_first: the filter comes after the convolution (the model's placement "inner"), not before the Linear.
        activation: None or "silu".
        impl: which implementation.

    Returns:
        [B, L, C_out], dtype of x; under autocast on a GPU float32 tensors but the basis and the mask are taken in
        autocast's dtype, as by torch's own matrix products.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, or one without the other that it needs; the
            message names it.
        ImplementationError: `impl` cannot run here.

    Source: arXiv 2505.04445 Eqs. 10 to 13; the torch.fft form is `fastm2rec.reference.spectral_projection`.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
    expect_alike("x", x, {"basis": basis, "mask": mask, "weight": weight, "bias": bias, "conv_weight": conv_weight,
                           "conv_bias": conv_bias})  # fmt: skip
    sizes: dict[str, int] = {}
    expect_shape("x", x, ("B", "L", "C"), sizes)
    expect_shape("basis", basis, ("L", "R") if basis.dim() == 2 else ("B", "L", "R"), sizes)
    if basis.requires_grad and torch.is_grad_enabled():
        raise ValueError("basis: expected data, got a tensor that requires a gradient")
    if weight is None:
        sizes["C_out"] = sizes["C"]
    else:
        expect_shape("weight", weight, ("C_out", "C"), sizes)
    for name, vector, matrix_name, matrix in (
        ("bias", bias, "weight", weight),
        ("conv_bias", conv_bias, "conv_weight", conv_weight),
    ):
        if vector is not None:
            if matrix is None:
                raise ValueError(f"{name}: expected None without a {matrix_name}, got a tensor")
            expect_shape(name, vector, ("C_out",), sizes)
    if conv_weight is not None:
        expect_shape("conv_weight", conv_weight, ("C_out", "width"), sizes)
    elif conv_first:
        raise ValueError("conv_first: expected False without a conv_weight, got True")
    if mask is not None:
        filtered = "C_out" if conv_first else "C"
        allowed = {(sizes["R"],), (sizes["B"], sizes["R"]), (sizes["R"], sizes[filtered])}
        if tuple(mask.shape) not in allowed:
            raise ValueError(
                f"mask: expected shape [R={sizes['R']}], [B={sizes['B']}, R] or [R, {filtered}={sizes[filtered]}], "
                f"got {list(mask.shape)}"
            )
    function = resolve("spectral_projection", impl, x.device)
    x, (weight, bias, conv_weight, conv_bias) = as_autocast(x, weight, bias, conv_weight, conv_bias)
    return function(
        x, basis, mask, weight, bias,
        conv_weight=conv_weight, conv_bias=conv_bias, conv_first=conv_first, activation=activation,
    )  # fmt: skip


def spectral_projection_fft(
    x: Tensor,
    gain: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    impl: str = AUTO,
) -> Tensor:
    """The Fourier filter of long sequences, by fast transforms: `y = irfft(g * rfft(x)) [W^T + b]`, along L.

    The same as `spectral_projection` with the padded Fourier basis; from about `FFT_COLUMNS` columns on it is faster.
    The transforms run in float32 (complex64), or float64.

    Args:
        x: [B, L, C], L at least 1.
        gain: g of the first K of the L // 2 + 1 bins, the others are dropped: [K] or, for each channel, [K, C].
        weight: W, [C_out, C], as in `torch.nn.Linear`.
        bias: b, [C_out]; needs `weight`.
        impl: which implementation.

    Returns:
        [B, L, C] or [B, L, C_out], dtype of x.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape; the message names it.
        ImplementationError: `impl` cannot run here.

    Source: arXiv 2505.04445 Eqs. 10 to 13.
    """
    expect_alike("x", x, {"gain": gain, "weight": weight, "bias": bias})
    sizes: dict[str, int] = {}
    expect_shape("x", x, ("B", "L", "C"), sizes)
    if sizes["L"] == 0:
        raise ValueError("x: expected an L of at least 1, got 0")
    expect_shape("gain", gain, ("K",) if gain.dim() == 1 else ("K", "C"), sizes)
    if not 1 <= sizes["K"] <= sizes["L"] // 2 + 1:
        raise ValueError(f"gain: expected 1 to L // 2 + 1 = {sizes['L'] // 2 + 1} bins, got {sizes['K']}")
    if weight is not None:
        expect_shape("weight", weight, ("C_out", "C"), sizes)
    if bias is not None:
        if weight is None:
            raise ValueError("bias: expected None without a weight, got a tensor")
        expect_shape("bias", bias, ("C_out",), sizes)
    return resolve("spectral_projection_fft", impl, x.device)(x, gain, weight, bias)
