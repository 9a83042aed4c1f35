"""From a block's convolution to its scan's output at the last position."""

from __future__ import annotations

import torch
from torch import Tensor

from ..impl import AUTO, resolve
from ._checks import expect_alike, expect_lengths, expect_shape


def last_scan(
    p: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    z: Tensor | None,
    lengths: Tensor,
    stride: int = 1,
    order: Tensor | None = None,
    *,
    impl: str = AUTO,
) -> Tensor:
    """What a Mamba block does between its convolution and its output projection, at each row's last position alone.

    `u = silu(p)`, of it every stride-th position, counted back from lengths - 1; `delta, B, C = x_proj(u)`;
    `dt = softplus(dt_proj(delta))`; then `last_state(u, dt, A, B, C, D, z)`.

    Args:
        p: [B, L, E], the convolution's output before SiLU, filtered where the filter is inside.
        x_proj_weight: [dt_rank + 2 N, E], the rows of delta, B and C.
        dt_proj_weight: [E, dt_rank].
        dt_proj_bias: [E] or None.
        A: [E, N], negative real.
        D: [E], skip connection.
        z: [B, E], output gate at the last position, or None.
        lengths: [B] integers, 1 to L: the last position is lengths - 1, later ones do not count.
        stride: 1 or more.
        order: [E] int64, a permutation: channel e of p is channel order[e] of all else. None for the same order. A CPU
            is faster where p's channels come in the order of their decay, the slowest first.
        impl: which implementation.

    Returns:
        y [B, E], dtype of p.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, an L of 0, lengths out of range (checked on
            a GPU with FASTM2REC_CHECK=1 only, and not in compiled graphs), or a stride that is not a positive integer.
        ImplementationError: `impl` cannot run here.

    Source: arXiv 2312.00752 Algorithm 2, in closed form.
    """
    expect_alike("p", p, {"x_proj_weight": x_proj_weight, "dt_proj_weight": dt_proj_weight,
                           "dt_proj_bias": dt_proj_bias, "A": A, "D": D, "z": z})  # fmt: skip
    sizes: dict[str, int] = {}
    expect_shape("p", p, ("B", "L", "E"), sizes)
    expect_scan(x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, sizes)
    if sizes["L"] == 0:
        raise ValueError("p: expected an L of at least 1, got 0")
    expect_stride(stride)
    expect_lengths(lengths, sizes["B"], sizes["L"], p)
    expect_order(order, p, sizes)
    function = resolve("last_scan", impl, p.device)
    return function(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, lengths, stride, order)


def expect_scan(
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    z: Tensor | None,
    sizes: dict[str, int],
) -> None:
    """What the scan reads, for B rows and E channels."""
    expect_shape("A", A, ("E", "N"), sizes)
    expect_shape("dt_proj_weight", dt_proj_weight, ("E", "dt_rank"), sizes)
    expect_shape("x_proj_weight", x_proj_weight, (sizes["dt_rank"] + 2 * sizes["N"], "E"), sizes)
    for name, vector in (("dt_proj_bias", dt_proj_bias), ("D", D)):
        if vector is not None:
            expect_shape(name, vector, ("E",), sizes)
    if z is not None:
        expect_shape("z", z, ("B", "E"), sizes)


def expect_stride(stride: int) -> None:
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
        raise ValueError(f"stride: expected an integer of at least 1, got {stride!r}")


def expect_order(order: Tensor | None, x: Tensor, sizes: dict[str, int]) -> None:
    """None, or a permutation of the channels E where x is; its values are checked outside of compiled graphs."""
    if order is None:
        return
    expect_shape("order", order, ("E",), sizes)
    if order.dtype != torch.int64 or order.device != x.device:
        raise TypeError(f"order: expected int64 on {x.device}, got {order.dtype} on {order.device}")
    places = torch.arange(sizes["E"], device=x.device)
    if not torch.compiler.is_compiling() and not torch.equal(order.sort().values, places):
        raise ValueError(
            f"order: expected each of 0 to {len(order) - 1} once, got {len(order.unique())} numbers from "
            f"{order.min()} to {order.max()}"
        )
