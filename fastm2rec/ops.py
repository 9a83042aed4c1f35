"""The ops of M2Rec: one public function each, with its shapes, its checks and the choice of an implementation.

Symbols: B batch, L = seqlen, C channels, R basis columns, D = d_model, E = dim = d_inner, N = d_state. The scan and the
convolution take mamba_ssm's channel-first layout (batch, dim, seqlen) with any strides, so a transposed view of a
[B, L, E] tensor costs nothing.

Every function takes `impl`: "auto", or the name of an implementation, which then runs or raises
`fastm2rec.impl.ImplementationError`. All checks of an op are in its function here; implementations trust them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .impl import AUTO, resolve


def _expect_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...], sizes: dict[str, int]) -> None:
    """Check `tensor` against a shape of numbers and letters; a letter's first use fixes its size."""
    fits = tensor.dim() == len(shape)
    for wanted, got in zip(shape, tensor.shape, strict=False):
        fits = fits and got == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, got))
    if not fits:
        expected = ", ".join(f"{s}={sizes[s]}" if isinstance(s, str) and s in sizes else str(s) for s in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")


def _expect_alike(first: str, tensor: Tensor, others: dict[str, Tensor | None]) -> None:
    """Check that all tensors are real floating point on one device."""
    for name, other in {first: tensor, **others}.items():
        if other is None:
            continue
        if not other.is_floating_point():
            raise TypeError(f"{name}: expected a real floating-point tensor, got {other.dtype}")
        if other.device != tensor.device:
            raise ValueError(f"{name}: expected device {tensor.device}, that of {first}, got {other.device}")


def _expect_lengths(lengths: Tensor, batch: int, seqlen: int, like: Tensor) -> None:
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.shape != (batch,):
        raise ValueError(
            f"lengths: expected {batch} integers (shape [{batch}]), got {lengths.dtype} of shape {list(lengths.shape)}"
        )
    if lengths.device != like.device:
        raise ValueError(f"lengths: expected device {like.device}, got {lengths.device}")
    # Reading values would stop a GPU's queue and break a compiled graph; there the caller vouches for them.
    if lengths.is_cuda or torch.compiler.is_compiling() or batch == 0:
        return
    low, high = torch.aminmax(lengths)
    if low < 1 or high > seqlen:
        raise ValueError(f"lengths: expected values from 1 to {seqlen}, got {int(low)} to {int(high)}")


def spectral_projection(
    x: Tensor,
    basis: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    impl: str = AUTO,
) -> Tensor:
    """A filter in the span of a basis, optionally followed by a Linear: `y = V (m * (V^T x)) [W^T + b]`.

    Args:
        x: [B, L, C].
        basis: V, [L, R] for all rows or [B, L, R], columns orthonormal or zero.
        mask: m, the gain of each column: [R], [B, R] or [R, C]; None is 1. Where B = R, a square mask counts as [B, R].
        weight: W, [C_out, C], as in `torch.nn.Linear`.
        bias: b, [C_out]; needs `weight`.
        impl: which implementation.

    Returns:
        [B, L, C] or [B, L, C_out], dtype of x.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape; the message names it.
        ImplementationError: `impl` cannot run here.

    Source: arXiv 2505.04445 Eqs. 10 to 13; the torch.fft form is `fastm2rec.reference.spectral_projection`.
    """
    _expect_alike("x", x, {"basis": basis, "mask": mask, "weight": weight, "bias": bias})
    sizes: dict[str, int] = {}
    _expect_shape("x", x, ("B", "L", "C"), sizes)
    _expect_shape("basis", basis, ("L", "R") if basis.dim() == 2 else ("B", "L", "R"), sizes)
    if mask is not None:
        allowed = {(sizes["R"],), (sizes["B"], sizes["R"]), (sizes["R"], sizes["C"])}
        if tuple(mask.shape) not in allowed:
            raise ValueError(
                f"mask: expected shape [R={sizes['R']}], [B={sizes['B']}, R] or [R, C={sizes['C']}], "
                f"got {list(mask.shape)}"
            )
    if weight is not None:
        _expect_shape("weight", weight, ("O", "C"), sizes)
    if bias is not None:
        if weight is None:
            raise ValueError("bias: expected None without a weight, got a tensor")
        _expect_shape("bias", bias, ("O",), sizes)
    return resolve("spectral_projection", impl, x.device)(x, basis, mask, weight, bias)


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
    _expect_alike("x", x, {"weight": weight, "bias": bias})
    sizes: dict[str, int] = {}
    _expect_shape("x", x, ("B", "dim", "seqlen"), sizes)
    _expect_shape("weight", weight, ("dim", "width"), sizes)
    if bias is not None:
        _expect_shape("bias", bias, ("dim",), sizes)
    return resolve("causal_conv1d", impl, x.device)(x, weight, bias, activation)


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
        impl: which implementation.

    Returns:
        y (B, dim, seqlen), dtype of u; with `return_last_state` also the state (B, dim, dstate), float32 or float64.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, or a seqlen of 0.
        ImplementationError: `impl` cannot run here.

    Source: arXiv 2312.00752 Algorithm 2.
    """
    _expect_alike("u", u, {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
                           "initial_state": initial_state})  # fmt: skip
    sizes: dict[str, int] = {}
    _expect_shape("u", u, ("batch", "dim", "seqlen"), sizes)
    _expect_shape("delta", delta, ("batch", "dim", "seqlen"), sizes)
    _expect_shape("A", A, ("dim", "dstate"), sizes)
    _expect_shape("B", B, ("batch", "dstate", "seqlen"), sizes)
    _expect_shape("C", C, ("batch", "dstate", "seqlen"), sizes)
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            _expect_shape(name, vector, ("dim",), sizes)
    if z is not None:
        _expect_shape("z", z, ("batch", "dim", "seqlen"), sizes)
    if initial_state is not None:
        _expect_shape("initial_state", initial_state, ("batch", "dim", "dstate"), sizes)
    if sizes["seqlen"] == 0:
        raise ValueError("u: expected a seqlen of at least 1, got 0")
    scan = resolve("selective_scan", impl, u.device)
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, initial_state)


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
        impl: which implementation.

    Returns:
        y (B, dim), dtype of u.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, a seqlen of 0, or lengths out of range (the
            values are checked on the CPU, outside compiled graphs).
        ImplementationError: `impl` cannot run here.
    """
    _expect_alike("u", u, {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias})
    sizes: dict[str, int] = {}
    _expect_shape("u", u, ("batch", "dim", "seqlen"), sizes)
    _expect_shape("delta", delta, ("batch", "dim", "seqlen"), sizes)
    _expect_shape("A", A, ("dim", "dstate"), sizes)
    _expect_shape("B", B, ("batch", "dstate", "seqlen"), sizes)
    _expect_shape("C", C, ("batch", "dstate"), sizes)
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            _expect_shape(name, vector, ("dim",), sizes)
    if z is not None:
        _expect_shape("z", z, ("batch", "dim"), sizes)
    if sizes["seqlen"] == 0:
        raise ValueError("u: expected a seqlen of at least 1, got 0")
    if lengths is not None:
        _expect_lengths(lengths, sizes["batch"], sizes["seqlen"], u)
    return resolve("last_state", impl, u.device)(u, delta, A, B, C, D, z, delta_bias, delta_softplus, lengths)


def gated_fusion(
    h: Tensor,
    text: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    residual: bool = False,
    impl: str = AUTO,
) -> Tensor:
    """The learned mix of sequence and text: `Y = (alpha * text + beta * h) W^T + b [+ h]` (arXiv 2505.04445 Eq. 16).

    Args:
        h: E_m, [B, D], the encoder's output.
        text: E_l, [B, D], the projected text of each row's last item; None leaves the text out (the control).
        alpha: [] or [D], the weight of the text; None for the context gate.
        beta: [] or [D], the weight of h; None for the context gate.
        weight: [D, D], as in `torch.nn.Linear`.
        bias: [D].
        gate_weight: [2 D, 2 D] for the context gate: `alpha, beta = sigmoid(cat(text, h) Wg^T + bg)`.
        gate_bias: [2 D].
        residual: add h.
        impl: which implementation.

    Returns:
        [B, D], dtype of h.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, or gates that contradict each other.
        ImplementationError: `impl` cannot run here.
    """
    _expect_alike("h", h, {"text": text, "alpha": alpha, "beta": beta, "weight": weight, "bias": bias,
                           "gate_weight": gate_weight, "gate_bias": gate_bias})  # fmt: skip
    sizes: dict[str, int] = {}
    _expect_shape("h", h, ("B", "D"), sizes)
    _expect_shape("weight", weight, ("D", "D"), sizes)
    _expect_shape("bias", bias, ("D",), sizes)
    constants = alpha is not None and beta is not None
    learned = gate_weight is not None and gate_bias is not None
    if text is None:
        if not (alpha is beta is gate_weight is gate_bias is None):
            raise ValueError("text: expected a tensor with alpha, beta or gate_weight, got None")
    else:
        _expect_shape("text", text, ("B", "D"), sizes)
        halves = (alpha is None) != (beta is None) or (gate_weight is None) != (gate_bias is None)
        if halves or constants == learned:
            raise ValueError("alpha: expected either alpha and beta, or gate_weight and gate_bias")
    for name, gate in (("alpha", alpha), ("beta", beta)):
        if gate is not None and gate.dim() > 0:
            _expect_shape(name, gate, ("D",), sizes)
    if gate_weight is not None and gate_bias is not None:
        twice = 2 * sizes["D"]
        _expect_shape("gate_weight", gate_weight, (twice, twice), sizes)
        _expect_shape("gate_bias", gate_bias, (twice,), sizes)
    function = resolve("gated_fusion", impl, h.device)
    return function(h, text, alpha, beta, weight, bias, gate_weight=gate_weight, gate_bias=gate_bias, residual=residual)
