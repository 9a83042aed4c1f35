"""A layer from its scan's output on."""

from __future__ import annotations

from torch import Tensor

from ..impl import AUTO, resolve
from ._checks import expect_alike, expect_shape


def output_ffn(
    y: Tensor,
    residual: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    last_weight: Tensor,
    last_bias: Tensor,
    eps: float = 1e-5,
    dropout: float = 0.0,
    *,
    impl: str = AUTO,
) -> Tensor:
    """What follows the scan in a layer: output projection, LayerNorm, feed-forward network, LayerNorm.

    `x = LayerNorm(dropout(y W_out^T + b_out) [+ residual])`, then
    `LayerNorm(x + dropout(dropout(gelu(x W_1^T + b_1)) W_2^T + b_2))` (arXiv 2403.03900).

    Args:
        y: [B, E], the scan's output, gated.
        residual: [B, D], the layer's input, or None.
        out_weight: [D, E], as in `torch.nn.Linear`, and so the other weights.
        out_bias: [D] or None, and so the other biases of products.
        norm_weight: [D], and norm_bias [D], of the first LayerNorm.
        fc1_weight: [H, D], and fc1_bias [H].
        fc2_weight: [D, H], and fc2_bias [D].
        last_weight: [D], and last_bias [D], of the second LayerNorm.
        eps: of both.
        dropout: probability; drawn from torch's generator, in a way that depends on the implementation.
        impl: which implementation.

    Returns:
        [B, D], dtype of y.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, or a dropout outside [0, 1).
        ImplementationError: `impl` cannot run here.
    """
    matrices = {"out_weight": (out_weight, ("D", "E")), "fc1_weight": (fc1_weight, ("H", "D")),
                "fc2_weight": (fc2_weight, ("D", "H"))}  # fmt: skip
    vectors = {"out_bias": (out_bias, "D"), "norm_weight": (norm_weight, "D"), "norm_bias": (norm_bias, "D"),
               "fc1_bias": (fc1_bias, "H"), "fc2_bias": (fc2_bias, "D"), "last_weight": (last_weight, "D"),
               "last_bias": (last_bias, "D")}  # fmt: skip
    others = {name: tensor for name, (tensor, _) in {**matrices, **vectors}.items()}
    expect_alike("y", y, {"residual": residual, **others})
    sizes: dict[str, int] = {}
    expect_shape("y", y, ("B", "E"), sizes)
    for name, (matrix, shape) in matrices.items():
        expect_shape(name, matrix, shape, sizes)
    if residual is not None:
        expect_shape("residual", residual, ("B", "D"), sizes)
    for name, (vector, size) in vectors.items():
        if vector is not None:
            expect_shape(name, vector, (size,), sizes)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    return resolve("output_ffn", impl, y.device)(
        y, residual, out_weight, out_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        last_weight, last_bias, eps, dropout,
    )  # fmt: skip
