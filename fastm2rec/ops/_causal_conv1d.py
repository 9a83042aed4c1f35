"""The depthwise convolution in front of the scan."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..impl import AUTO, resolve
from ._checks import expect_alike, expect_shape


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    *,
    impl: str = AUTO,
) -> Tensor:
    """A depthwise convolution that sees the present and the past: `y[t] = b + sum_j w[:, j] x[t - (width - 1) + j]`.

    Args:
        x: (B, dim, seqlen).
        weight: (dim, width).
        bias: (dim,).
        activation: None or "silu".
        impl: which implementation.

    Returns:
        (B, dim, seqlen), dtype of x.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, or an unknown activation.
        ImplementationError: `impl` cannot run here.

    Source: the contract of `causal_conv1d.causal_conv1d_fn`.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
    expect_alike("x", x, {"weight": weight, "bias": bias})
    sizes: dict[str, int] = {}
    expect_shape("x", x, ("B", "dim", "seqlen"), sizes)
    expect_shape("weight", weight, ("dim", "width"), sizes)
    if bias is not None:
        expect_shape("bias", bias, ("dim",), sizes)
    return resolve("causal_conv1d", impl, x.device)(x, weight, bias, activation)
