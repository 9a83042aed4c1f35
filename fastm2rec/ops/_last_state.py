"""The scan at the last position alone, in closed form."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..impl import AUTO, resolve
from ..kernels._nodes import EXPONENTIALS, Nodes, accepted
from ._checks import expect_alike, expect_lengths, expect_shape


def last_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    lengths: Tensor | None = None,
    *,
    exponentials: Literal["exact", "nodes", "auto"] = "exact",
    nodes: Nodes | None = None,
    splits: int = 1,
    impl: str = AUTO,
) -> Tensor:
    """The selective scan's output at each row's last position alone, in closed form.

    `y[e] = sum_t delta_t u_t sum_n C_n B_tn exp(A_en T_t) + D u_last`, `T_t` the sum of delta after t; then
    `y * silu(z)`. Equal to `selective_scan(...)[..., lengths - 1]`.

    Args:
        u: (B, dim, seqlen).
        delta: (B, dim, seqlen), the step sizes, before bias and softplus.
        A: (dim, dstate), negative real.
        B: (B, dstate, seqlen).
        C: (B, dstate), at the last position.
        D: (dim,), skip connection.
        z: (B, dim), output gate at the last position.
        delta_bias: (dim,), added to delta.
        delta_softplus: pass delta (with its bias) through softplus.
        lengths: [B] integers, 1 to seqlen: the last position is lengths - 1, later ones do not count; None is seqlen.
        exponentials: "exact"; "nodes" approximates exp(A T) for T >= 0 (so delta must not be negative) by a few fixed
            exponentials on the tensor cores; "auto" takes nodes where their fit passes, else exact ones. Gradients
            are those of the exact function. Implementations that have no nodes (the reference) compute exactly.
        nodes: `fit_nodes(A)`, made once where weights are loaded and again whenever A changes: a stale fit is not
            noticed.
        splits: parts into which each row is split over time, for batches too small to fill a GPU; their sums are added
            in a fixed order. Gradients are not split. Results for different values differ by roundings.
        impl: which implementation.

    Returns:
        y (B, dim), dtype of u.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, a seqlen of 0, or lengths out of range
            (checked on a GPU with FASTM2REC_CHECK=1 only, and not in compiled graphs); an unknown word for
            `exponentials`; nodes of another shape or device, missing, or whose error exceeds their tolerance; fewer
            splits than 1.
        ImplementationError: `impl` cannot run here.
    """
    expect_alike("u", u, {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias})
    sizes: dict[str, int] = {}
    expect_shape("u", u, ("batch", "dim", "seqlen"), sizes)
    expect_shape("delta", delta, ("batch", "dim", "seqlen"), sizes)
    expect_shape("A", A, ("dim", "dstate"), sizes)
    expect_shape("B", B, ("batch", "dstate", "seqlen"), sizes)
    expect_shape("C", C, ("batch", "dstate"), sizes)
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            expect_shape(name, vector, ("dim",), sizes)
    if z is not None:
        expect_shape("z", z, ("batch", "dim"), sizes)
    if sizes["seqlen"] == 0:
        raise ValueError("u: expected a seqlen of at least 1, got 0")
    if lengths is not None:
        expect_lengths(lengths, sizes["batch"], sizes["seqlen"], u)
    if exponentials not in EXPONENTIALS:
        raise ValueError(f"exponentials: expected one of {', '.join(EXPONENTIALS)}, got {exponentials!r}")
    if nodes is not None:
        _expect_nodes(nodes, u, sizes)
    accepted(exponentials, nodes)
    if splits < 1:
        raise ValueError(f"splits: expected at least 1, got {splits}")
    function = resolve("last_state", impl, u.device)
    return function(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, lengths, exponentials, nodes, splits
    )  # fmt: skip


def _expect_nodes(nodes: Nodes, like: Tensor, sizes: dict[str, int]) -> None:
    if not isinstance(nodes, Nodes):
        raise TypeError(f"nodes: expected what fit_nodes(A) returns, got {type(nodes).__name__}")
    expect_alike("u", like, {"nodes": nodes.coefficients})
    expect_shape("nodes", nodes.coefficients, ("count", "dstate", "dim"), sizes)
