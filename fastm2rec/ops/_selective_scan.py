"""The scan at all positions."""

from __future__ import annotations

import torch
from torch import Tensor

from .._values import readable
from ..impl import AUTO, resolve
from ._checks import expect_alike, expect_shape


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    impl: str = AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective state-space recurrence at all positions, with the arguments of `mamba_ssm.selective_scan_fn`.

    `h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t`, `y_t = C_t . h_t + D u_t`, then `y * silu(z)`.

    Args:
        u: (B, dim, seqlen).
        delta: (B, dim, seqlen), the step sizes, before bias and softplus.
        A: (dim, dstate), negative real.
        B: (B, dstate, seqlen).
        C: (B, dstate, seqlen).
        D: (dim,), skip connection.
        z: (B, dim, seqlen), output gate.
        delta_bias: (dim,), added to delta.
        delta_softplus: pass delta (with its bias) through softplus.
        return_last_state: also return h at the last position.
        initial_state: (B, dim, dstate), h before the first position; None is 0.
        cu_seqlens: [n_sequences + 1] int32 or int64, strictly increasing from 0 to seqlen. The one row (B = 1) then
            holds n_sequences sequences, s from position cu_seqlens[s] to before cu_seqlens[s + 1]; h starts anew in
            each, and the initial and last states are (n_sequences, dim, dstate).
        impl: which implementation.

    Returns:
        y (B, dim, seqlen), dtype of u; with `return_last_state` also the state (B, dim, dstate), or
        (n_sequences, dim, dstate), float32 or float64.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, a seqlen of 0, or wrong cu_seqlens
            (checked on a GPU with FASTM2REC_CHECK=1 only, and not in compiled graphs). The Triton kernels take dstate
            up to 256.
        ImplementationError: `impl` cannot run here.

    Source: arXiv 2312.00752 Algorithm 2.
    """
    expect_alike("u", u, {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
                           "initial_state": initial_state})  # fmt: skip
    sizes: dict[str, int] = {}
    expect_shape("u", u, ("batch", "dim", "seqlen"), sizes)
    expect_shape("delta", delta, ("batch", "dim", "seqlen"), sizes)
    expect_shape("A", A, ("dim", "dstate"), sizes)
    expect_shape("B", B, ("batch", "dstate", "seqlen"), sizes)
    expect_shape("C", C, ("batch", "dstate", "seqlen"), sizes)
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            expect_shape(name, vector, ("dim",), sizes)
    if z is not None:
        expect_shape("z", z, ("batch", "dim", "seqlen"), sizes)
    if sizes["seqlen"] == 0:
        raise ValueError("u: expected a seqlen of at least 1, got 0")
    sizes["n_sequences"] = sizes["batch"]
    if cu_seqlens is not None:
        _expect_cu_seqlens(cu_seqlens, sizes["batch"], sizes["seqlen"], u)
        sizes["n_sequences"] = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        expect_shape("initial_state", initial_state, ("n_sequences", "dim", "dstate"), sizes)
    scan = resolve("selective_scan", impl, u.device)
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, initial_state, cu_seqlens)


def _expect_cu_seqlens(cu_seqlens: Tensor, batch: int, seqlen: int, like: Tensor) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "cu_seqlens: expected int32 or int64 of shape [n_sequences + 1], "
            f"got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(f"cu_seqlens: expected a batch of 1 that holds all sequences, got {batch} rows")
    if cu_seqlens.device != like.device:
        raise ValueError(f"cu_seqlens: expected device {like.device}, got {cu_seqlens.device}")
    if not readable(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != seqlen:
        raise ValueError(f"cu_seqlens: expected values from 0 to the seqlen {seqlen}, got {first} to {last}")
    if (falls := cu_seqlens.diff() < 1).any():
        s = int(falls.int().argmax())
        raise ValueError(
            "cu_seqlens: expected strictly increasing values, "
            f"got {int(cu_seqlens[s])} then {int(cu_seqlens[s + 1])} at index {s}"
        )
