"""Embedded items as an encoder reads them."""

from __future__ import annotations

from torch import Tensor

from ..impl import AUTO, resolve
from ._checks import expect_alike, expect_lengths, expect_shape


def dropout_norm(
    e: Tensor,
    lengths: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout: float = 0.0,
    *,
    impl: str = AUTO,
) -> Tensor:
    """`LayerNorm(dropout(e))`, zero at padding.

    Args:
        e: [B, L, C], embedded items.
        lengths: [B] integers, 1 to L: later positions are padding.
        weight: [C], and bias [C], of the LayerNorm.
        eps: of the LayerNorm.
        dropout: probability; drawn from torch's generator, in a way that depends on the implementation.
        impl: which implementation.

    Returns:
        [B, L, C], dtype of e.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, lengths out of range (checked on the CPU,
            outside compiled graphs), or a dropout outside [0, 1).
        ImplementationError: `impl` cannot run here.
    """
    expect_alike("e", e, {"weight": weight, "bias": bias})
    sizes: dict[str, int] = {}
    expect_shape("e", e, ("B", "L", "C"), sizes)
    expect_shape("weight", weight, ("C",), sizes)
    expect_shape("bias", bias, ("C",), sizes)
    expect_lengths(lengths, sizes["B"], sizes["L"], e)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    return resolve("dropout_norm", impl, e.device)(e, lengths, weight, bias, eps, dropout)
