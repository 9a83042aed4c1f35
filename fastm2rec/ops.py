"""The ops of M2Rec: one public function each, with its shapes, its checks and the choice of an implementation.

Symbols: B batch, L = seqlen, C channels, R basis columns, D = d_model, E = dim = d_inner, N = d_state. The scan and the
convolution take mamba_ssm's channel-first layout (batch, dim, seqlen) with any strides, so a transposed view of a
[B, L, E] tensor costs nothing.

Every function takes `impl`: "auto", or the name of an implementation, which then runs or raises
`fastm2rec.impl.ImplementationError`. All checks of an op are in its function here; implementations trust them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .impl import AUTO, resolve
from .kernels._nodes import EXPONENTIALS, Nodes, accepted
from .kernels._nodes import fit_nodes as fit_nodes

if TYPE_CHECKING:
    from .folded import Folded


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


def _expect_ids(ids: Tensor, batch: int, n_rows: int, like: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: expected int32 or int64, got {ids.dtype}")
    _expect_shape("ids", ids, (batch,), {})
    if ids.device != like.device:
        raise ValueError(f"ids: expected device {like.device}, got {ids.device}")
    if n_rows == 0 and batch > 0:
        raise ValueError("text: expected at least one row for ids, got none")
    if ids.is_cuda or torch.compiler.is_compiling() or batch == 0:  # as for lengths
        return
    low, high = torch.aminmax(ids)
    if low < 0 or high >= n_rows:
        raise ValueError(f"ids: expected values from 0 to {n_rows - 1}, got {int(low)} to {int(high)}")


# From this many basis columns on, `spectral_projection_fft` should be the faster one for the padded Fourier spectrum.
# An estimate until it is measured: a column costs 2 (C + C_out) operations a position on tensor cores, the transforms a
# fixed number of float32 trips through memory, and at 64 to 256 channels the two meet near here.
FFT_COLUMNS = 1024


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
    if cu_seqlens.is_cuda or torch.compiler.is_compiling():  # as for lengths
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


def _expect_nodes(nodes: Nodes, like: Tensor, sizes: dict[str, int]) -> None:
    if not isinstance(nodes, Nodes):
        raise TypeError(f"nodes: expected what fit_nodes(A) returns, got {type(nodes).__name__}")
    _expect_alike("u", like, {"nodes": nodes.coefficients})
    _expect_shape("nodes", nodes.coefficients, ("count", "dstate", "dim"), sizes)


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
        [B, L, C_out], dtype of x.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, or one without the other that it needs; the
            message names it.
        ImplementationError: `impl` cannot run here.

    Source: arXiv 2505.04445 Eqs. 10 to 13; the torch.fft form is `fastm2rec.reference.spectral_projection`.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
    _expect_alike("x", x, {"basis": basis, "mask": mask, "weight": weight, "bias": bias, "conv_weight": conv_weight,
                           "conv_bias": conv_bias})  # fmt: skip
    sizes: dict[str, int] = {}
    _expect_shape("x", x, ("B", "L", "C"), sizes)
    _expect_shape("basis", basis, ("L", "R") if basis.dim() == 2 else ("B", "L", "R"), sizes)
    if basis.requires_grad and torch.is_grad_enabled():
        raise ValueError("basis: expected data, got a tensor that requires a gradient")
    if weight is None:
        sizes["C_out"] = sizes["C"]
    else:
        _expect_shape("weight", weight, ("C_out", "C"), sizes)
    for name, vector, matrix_name, matrix in (
        ("bias", bias, "weight", weight),
        ("conv_bias", conv_bias, "conv_weight", conv_weight),
    ):
        if vector is not None:
            if matrix is None:
                raise ValueError(f"{name}: expected None without a {matrix_name}, got a tensor")
            _expect_shape(name, vector, ("C_out",), sizes)
    if conv_weight is not None:
        _expect_shape("conv_weight", conv_weight, ("C_out", "width"), sizes)
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
    _expect_alike("x", x, {"gain": gain, "weight": weight, "bias": bias})
    sizes: dict[str, int] = {}
    _expect_shape("x", x, ("B", "L", "C"), sizes)
    if sizes["L"] == 0:
        raise ValueError("x: expected an L of at least 1, got 0")
    _expect_shape("gain", gain, ("K",) if gain.dim() == 1 else ("K", "C"), sizes)
    if not 1 <= sizes["K"] <= sizes["L"] // 2 + 1:
        raise ValueError(f"gain: expected 1 to L // 2 + 1 = {sizes['L'] // 2 + 1} bins, got {sizes['K']}")
    if weight is not None:
        _expect_shape("weight", weight, ("C_out", "C"), sizes)
    if bias is not None:
        if weight is None:
            raise ValueError("bias: expected None without a weight, got a tensor")
        _expect_shape("bias", bias, ("C_out",), sizes)
    return resolve("spectral_projection_fft", impl, x.device)(x, gain, weight, bias)


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
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, a seqlen of 0, or wrong cu_seqlens (the
            values are checked on the CPU, outside compiled graphs). The Triton kernels take dstate up to 256.
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
    if sizes["seqlen"] == 0:
        raise ValueError("u: expected a seqlen of at least 1, got 0")
    sizes["n_sequences"] = sizes["batch"]
    if cu_seqlens is not None:
        _expect_cu_seqlens(cu_seqlens, sizes["batch"], sizes["seqlen"], u)
        sizes["n_sequences"] = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _expect_shape("initial_state", initial_state, ("n_sequences", "dim", "dstate"), sizes)
    scan = resolve("selective_scan", impl, u.device)
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, initial_state, cu_seqlens)


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
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, a seqlen of 0, or lengths out of range (the
            values are checked on the CPU, outside compiled graphs); an unknown word for `exponentials`; nodes of
            another shape or device, missing, or whose error exceeds their tolerance; fewer splits than 1.
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


def gated_fusion(
    h: Tensor,
    text: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    ids: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    residual: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
    impl: str = AUTO,
) -> Tensor:
    """The learned mix of sequence and text: `Y = (alpha * text + beta * h) W^T + b [+ h]` (arXiv 2505.04445 Eq. 16).

    Args:
        h: E_m, [B, D], the encoder's output.
        text: E_l, the projected text of each row's last item, [B, D], or with `ids` the projected text of all items,
            [n_rows, D], of which the rows are looked up inside; None leaves the text out (the control).
        alpha: [] or [D], the weight of the text; None for the context gate.
        beta: [] or [D], the weight of h; None for the context gate.
        weight: [D, D], as in `torch.nn.Linear`.
        bias: [D].
        ids: [B] int32 or int64, 0 to n_rows - 1: the row of `text` that belongs to each row of h.
        gate_weight: [2 D, 2 D] for the context gate: `alpha, beta = sigmoid(cat(text, h) Wg^T + bg)`.
        gate_bias: [2 D].
        residual: add h.
        norm_weight: [D], for a LayerNorm of the result, after the residual.
        norm_bias: [D]; both or neither.
        eps: of the LayerNorm.
        impl: which implementation.

    Returns:
        [B, D], dtype of h.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, gates that contradict each other, or ids
            out of range (the values are checked on the CPU, outside compiled graphs; Triton's kernel takes the
            nearest row otherwise).
        ImplementationError: `impl` cannot run here.
    """
    _expect_alike("h", h, {"text": text, "alpha": alpha, "beta": beta, "weight": weight, "bias": bias,
                           "gate_weight": gate_weight, "gate_bias": gate_bias, "norm_weight": norm_weight,
                           "norm_bias": norm_bias})  # fmt: skip
    sizes: dict[str, int] = {}
    _expect_shape("h", h, ("B", "D"), sizes)
    _expect_shape("weight", weight, ("D", "D"), sizes)
    _expect_shape("bias", bias, ("D",), sizes)
    constants = alpha is not None and beta is not None
    learned = gate_weight is not None and gate_bias is not None
    if text is None:
        if not (alpha is beta is gate_weight is gate_bias is None):
            raise ValueError("text: expected a tensor with alpha, beta or gate_weight, got None")
        if ids is not None:
            raise ValueError("ids: expected None without a text, got a tensor")
    else:
        _expect_shape("text", text, ("B" if ids is None else "n_rows", "D"), sizes)
        if ids is not None:
            _expect_ids(ids, sizes["B"], sizes["n_rows"], h)
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
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_weight" if norm_weight is None else "norm_bias"
        raise ValueError(f"{missing}: expected both norm_weight and norm_bias, or neither, got None")
    if norm_weight is not None and norm_bias is not None:
        _expect_shape("norm_weight", norm_weight, ("D",), sizes)
        _expect_shape("norm_bias", norm_bias, ("D",), sizes)
    function = resolve("gated_fusion", impl, h.device)
    return function(
        h, text, alpha, beta, weight, bias, ids=ids, gate_weight=gate_weight, gate_bias=gate_bias, residual=residual,
        norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
    )  # fmt: skip


def encode_last(item_ids: Tensor, lengths: Tensor, folded: Folded, *, impl: str = AUTO) -> Tensor:
    """Item ids to query vectors, for inference: a folded one-layer M2Rec, of which only the last position is computed.

    Args:
        item_ids: [B, L] integers, L at most `max_len`: items 1..n_items in the first `lengths[b]` slots of row b; what
            stands behind them is not read.
        lengths: [B] integers, 1 to L.
        folded: the weights, from `fastm2rec.folded.fold`.
        impl: which implementation.

    Returns:
        [B, D], dtype of the folded weights. It has no gradient.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, or values out of range (values are checked
            on the CPU, outside compiled graphs).
        RuntimeError: folded weights that require a gradient, under grad mode.
        ImplementationError: `impl` cannot run here.
    """
    if item_ids.is_floating_point() or item_ids.is_complex() or item_ids.dtype == torch.bool:
        raise TypeError(f"item_ids: expected integers, got {item_ids.dtype}")
    if item_ids.dim() != 2 or not 1 <= item_ids.shape[1] <= folded.max_len:
        raise ValueError(f"item_ids: expected shape [B, 1..{folded.max_len}], got {list(item_ids.shape)}")
    if item_ids.device != folded.device:
        raise ValueError(f"item_ids: expected device {folded.device}, that of the weights, got {item_ids.device}")
    _expect_lengths(lengths, item_ids.shape[0], item_ids.shape[1], item_ids)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in folded.tensors().values()):
        raise RuntimeError("encode_last is for inference and has no gradient; train with M2Rec.encode")
    if not (item_ids.is_cuda or torch.compiler.is_compiling()) and item_ids.numel():
        real = torch.arange(item_ids.shape[1], device=item_ids.device) < lengths.unsqueeze(1)
        low, high = torch.aminmax(item_ids[real])
        if low < 1 or high > folded.n_items:
            raise ValueError(f"item_ids: expected ids from 1 to {folded.n_items}, got {int(low)} to {int(high)}")
    return resolve("encode_last", impl, item_ids.device)(item_ids.long(), lengths.long(), folded)


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
        impl: which implementation.

    Returns:
        y [B, E], dtype of p.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, an L of 0, lengths out of range (the values
            are checked on the CPU, outside compiled graphs), or a stride that is not a positive integer.
        ImplementationError: `impl` cannot run here.

    Source: arXiv 2312.00752 Algorithm 2, in closed form.
    """
    _expect_alike("p", p, {"x_proj_weight": x_proj_weight, "dt_proj_weight": dt_proj_weight,
                           "dt_proj_bias": dt_proj_bias, "A": A, "D": D, "z": z})  # fmt: skip
    sizes: dict[str, int] = {}
    _expect_shape("p", p, ("B", "L", "E"), sizes)
    _expect_shape("A", A, ("E", "N"), sizes)
    _expect_shape("dt_proj_weight", dt_proj_weight, ("E", "dt_rank"), sizes)
    _expect_shape("x_proj_weight", x_proj_weight, (sizes["dt_rank"] + 2 * sizes["N"], "E"), sizes)
    for name, vector in (("dt_proj_bias", dt_proj_bias), ("D", D)):
        if vector is not None:
            _expect_shape(name, vector, ("E",), sizes)
    if z is not None:
        _expect_shape("z", z, ("B", "E"), sizes)
    if sizes["L"] == 0:
        raise ValueError("p: expected an L of at least 1, got 0")
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
        raise ValueError(f"stride: expected an integer of at least 1, got {stride!r}")
    _expect_lengths(lengths, sizes["B"], sizes["L"], p)
    function = resolve("last_scan", impl, p.device)
    return function(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, lengths, stride)
