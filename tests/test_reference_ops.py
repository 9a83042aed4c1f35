"""The reference ops against independent formulas, and their gradients against finite differences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from fastm2rec.reference.causal_conv1d import causal_conv1d
from fastm2rec.reference.gated_fusion import gated_fusion, scale_text
from fastm2rec.reference.last_scan import last_scan
from fastm2rec.reference.last_state import last_state
from fastm2rec.reference.selective_scan import selective_scan
from fastm2rec.reference.spectral_projection import (
    frequencies,
    mask_gain,
    spectral_filter,
    spectral_projection,
    spectral_projection_fft,
)

LENGTHS = [1, 2, 7, 50, 63]


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _dft_matrix_filter(x: Tensor, gain_of: Any) -> Tensor:
    """The filter by the complex DFT matrix, both signs of the frequency written out."""
    n = x.shape[1]
    k = torch.arange(n)
    W = torch.exp(-2j * math.pi * torch.outer(k, k).double() / n)
    gain = gain_of(torch.minimum(k, n - k).double() / n)
    return torch.einsum("tk,k,ks,bsc->btc", W.conj() / n, gain.to(W.dtype), W, x.to(W.dtype)).real


def _dct_matrix_filter(x: Tensor, gain_of: Any) -> Tensor:
    n = x.shape[1]
    k, t = torch.arange(n).double(), torch.arange(n).double()
    V = torch.cos(math.pi * torch.outer(2 * t + 1, k) / (2 * n))
    V = V / V.norm(dim=0)
    return torch.einsum("tk,k,sk,bsc->btc", V, gain_of(k / (2 * n)), V, x)


@pytest.mark.parametrize(
    ("n", "basis", "mask", "theta"),
    list(itertools.product(LENGTHS, ["fourier", "dct"], ["hard", "soft", "straight_through"], [0.0, 0.1, 0.31, 0.5])),
)
def test_filter_is_the_transform_matrix(n: int, basis: str, mask: str, theta: float) -> None:
    x = r(2, n, 3)

    def gain_of(f: Tensor) -> Tensor:
        return torch.sigmoid((theta - f) / 0.05) if mask == "soft" else (f <= theta + 1e-12).double()

    written_out = _dft_matrix_filter if basis == "fourier" else _dct_matrix_filter
    actual = spectral_filter(x, theta, mask=mask, tau=0.05, basis=basis)
    torch.testing.assert_close(actual, written_out(x, gain_of), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("theta", "n", "kept"), [(0.1, 50, 6), (0.1, 200, 21), (0.1, 30, 4), (0.3, 10, 4), (0, 9, 1)])
def test_eq_12_keeps_the_bins_at_the_cutoff(theta: float, n: int, kept: int) -> None:
    assert int(mask_gain(frequencies(n), theta).sum()) == kept


@pytest.mark.parametrize("basis", ["fourier", "dct"])
def test_a_low_pass_passes_slow_and_stops_fast(basis: str) -> None:
    t = torch.arange(100).double()
    slow, fast = torch.cos(math.pi * 2 * (2 * t + 1) / 200), torch.cos(math.pi * 80 * (2 * t + 1) / 200)
    y = spectral_filter((slow + fast)[None, :, None], 0.1, basis=basis)[0, :, 0]
    torch.testing.assert_close(y, slow, rtol=0, atol=0.05)
    assert (y - slow - fast).norm() > 5


def test_valid_rows_are_filtered_over_their_own_length() -> None:
    x = r(4, 20, 2)
    lengths = torch.tensor([1, 7, 12, 20])
    y = spectral_filter(x, 0.2, spectrum="valid", lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(y[row, :n], spectral_filter(x[row : row + 1, :n], 0.2)[0], rtol=0, atol=1e-14)
        assert not y[row, n:].any()
    with pytest.raises(ValueError, match="lengths: expected the rows' lengths"):
        spectral_filter(x, 0.2, spectrum="valid")


@pytest.mark.parametrize(
    ("basis", "mask", "spectrum"),
    list(itertools.product(["fourier", "dct"], ["hard", "soft"], ["padded", "valid"])),
)
def test_filter_gradients(basis: str, mask: str, spectrum: str) -> None:
    x, theta = r(3, 7, 2).requires_grad_(), torch.tensor(0.17, dtype=torch.float64, requires_grad=mask == "soft")
    lengths = torch.tensor([7, 1, 4])

    def function(x: Tensor, theta: Tensor) -> Tensor:
        return spectral_filter(x, theta, mask=mask, tau=0.1, basis=basis, spectrum=spectrum, lengths=lengths)

    assert gradcheck(function, (x, theta))


def test_straight_through_has_the_hard_value_and_the_soft_gradient() -> None:
    f = frequencies(20)
    grads = []
    for kind in ("soft", "straight_through"):
        theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        gain = mask_gain(f, theta, kind, 0.05)
        (gain * torch.arange(len(f))).sum().backward()
        grads.append(theta.grad)
    torch.testing.assert_close(gain.detach(), mask_gain(f, 0.2, "hard"))
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0] is not None
    assert grads[0] != 0


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("mask", ["none", "R", "BR", "RC"])
def test_projection_is_its_formula(per_row: bool, mask: str) -> None:
    B, L, C, R, out = 2, 7, 3, 4, 5
    x, V = r(B, L, C), r(B, L, R) if per_row else r(L, R)
    m = {"none": None, "R": r(R), "BR": r(B, R), "RC": r(R, C)}[mask]
    W, b = r(out, C), r(out)
    full = torch.ones(B, R, C, dtype=torch.float64)
    if m is not None:
        full = full * (m if mask == "RC" else m[..., None])
    expected = torch.einsum("btr,brc,bsr,bsc->btc", V.expand(B, L, R), full, V.expand(B, L, R), x)
    torch.testing.assert_close(spectral_projection(x, V, m), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(spectral_projection(x, V, m, W, b), F.linear(expected, W, b), rtol=1e-12, atol=1e-12)
    leaves = [t.requires_grad_() for t in (x, V, *([] if m is None else [m]), W, b)]

    def function(*args: Tensor) -> Tensor:
        x, V, *rest = args
        return spectral_projection(x, V, *([None, *rest] if m is None else rest))

    assert gradcheck(function, leaves)


@pytest.mark.parametrize(("seqlen", "width"), list(itertools.product(LENGTHS, [1, 2, 4])))
def test_convolution_is_torchs_and_causal(seqlen: int, width: int) -> None:
    x, w, b = r(2, 3, seqlen), r(3, width), r(3)
    expected = F.conv1d(x, w[:, None], b, padding=width - 1, groups=3)[..., :seqlen]
    torch.testing.assert_close(causal_conv1d(x, w, b), expected)
    torch.testing.assert_close(causal_conv1d(x, w, b, "silu"), F.silu(expected))
    torch.testing.assert_close(causal_conv1d(x, w), expected - b[:, None])
    assert gradcheck(lambda x, w, b: causal_conv1d(x, w, b, "silu"), [t.requires_grad_() for t in (x[..., :7], w, b)])


def _arguments(seqlen: int, batch: int = 2, dim: int = 3, dstate: int = 4) -> dict[str, Any]:
    return {
        "u": r(batch, dim, seqlen), "delta": r(batch, dim, seqlen), "A": -r(dim, dstate).exp(),
        "B": r(batch, dstate, seqlen), "C": r(batch, dstate, seqlen), "D": r(dim), "z": r(batch, dim, seqlen),
        "delta_bias": r(dim), "delta_softplus": True,
    }  # fmt: skip


def _as(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def _unrolled(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None) -> Tensor:
    """y_t = C_t sum_{s <= t} exp(A sum_{s < j <= t} delta_j) delta_s B_s u_s, as a lower-triangular matrix."""
    L = u.shape[2]
    sums = delta.cumsum(2)
    decay = sums[:, :, :, None] - sums[:, :, None, :]  # [b, e, t, s]
    exponent = decay[..., None] * A[None, :, None, None, :]
    causal = torch.ones(L, L, dtype=torch.bool).tril()[None, None, :, :, None]
    kernel = torch.where(causal, exponent, -torch.inf).exp()
    y = torch.einsum("betsn,bnt,bns,bes->bet", kernel, C, B, delta * u)
    if h0 is not None:
        y = y + torch.einsum("bnt,betn,ben->bet", C, torch.exp(sums[..., None] * A[None, :, None]), h0)
    return y


@pytest.mark.parametrize("seqlen", LENGTHS)
def test_scan_is_the_unrolled_sum(seqlen: int) -> None:
    a = _arguments(seqlen)
    steps = F.softplus(a["delta"] + a["delta_bias"][:, None])
    h0 = r(2, 3, 4)
    expected = _unrolled(a["u"], steps, a["A"], a["B"], a["C"], h0) + a["D"][:, None] * a["u"]
    expected = expected * F.silu(a["z"])
    torch.testing.assert_close(selective_scan(**a, initial_state=h0), expected, rtol=1e-10, atol=1e-10)


def test_scan_can_be_cut_in_two() -> None:
    a = _arguments(13)
    whole, last = selective_scan(**a, return_last_state=True)
    parts, state = [], None
    for cut in (slice(0, 5), slice(5, 13)):
        part: dict[str, Any] = {k: v[..., cut] if isinstance(v, Tensor) and v.dim() == 3 else v for k, v in a.items()}
        y, state = selective_scan(**part, initial_state=state, return_last_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("optional", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_last_state_is_the_scan_at_the_last_position(seqlen: int, optional: tuple[str, ...]) -> None:
    a = _arguments(seqlen, batch=4)
    for name in {"D", "z", "delta_bias"} - set(optional):
        a[name] = None
    lengths = torch.tensor([seqlen, 1, max(1, seqlen // 2), max(1, seqlen - 1)])
    rows = torch.arange(4)
    last = {**a, "C": a["C"][rows, :, lengths - 1], "z": None if a["z"] is None else a["z"][rows, :, lengths - 1]}
    everywhere = selective_scan(**a)
    assert isinstance(everywhere, Tensor)
    expected = everywhere[rows, :, lengths - 1]
    torch.testing.assert_close(last_state(**last, lengths=lengths), expected, rtol=1e-11, atol=1e-11)
    end = {**a, "C": a["C"][..., -1], "z": None if a["z"] is None else a["z"][..., -1]}
    torch.testing.assert_close(last_state(**end), everywhere[..., -1], rtol=1e-11, atol=1e-11)


def test_last_state_does_not_read_its_padding() -> None:
    a = _arguments(9)
    a["C"], a["z"] = a["C"][..., 0], a["z"][..., 0]
    lengths = torch.tensor([4, 9])
    before = last_state(**a, lengths=lengths)
    for name in ("u", "delta", "B"):
        a[name][0, :, 4:] = 1e9
    assert torch.equal(last_state(**a, lengths=lengths), before)


def test_last_state_in_float32_over_a_long_sequence() -> None:
    a = _arguments(1600, dim=2)
    a["C"], a["z"] = a["C"][..., -1], a["z"][..., -1]
    exact = last_state(**a)
    single = last_state(**_as(a, torch.float32))
    assert single.dtype == torch.float32
    assert (single.double() - exact).norm() / exact.norm() < 2e-5


@pytest.mark.parametrize("closed", [False, True])
def test_scan_gradients(closed: bool) -> None:
    a = _arguments(7, dim=2, dstate=3)
    if closed:
        a["C"], a["z"] = a["C"][..., -1].clone(), a["z"][..., -1].clone()
        a["lengths"] = torch.tensor([7, 4])
    else:
        a["initial_state"] = r(2, 2, 3)
    names = [name for name, value in a.items() if isinstance(value, Tensor) and value.is_floating_point()]
    op: Any = last_state if closed else selective_scan

    def function(*leaves: Tensor) -> Tensor:
        return op(**{**a, **dict(zip(names, leaves, strict=True))})

    assert gradcheck(function, [a[name].requires_grad_() for name in names])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    a = _as(_arguments(20), dtype)
    exact = selective_scan(**_as(a, torch.float64))
    low = selective_scan(**a)
    assert isinstance(exact, Tensor)
    assert isinstance(low, Tensor)
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_gate_forms_are_their_formulas() -> None:
    h, text, W, b = r(4, 3), r(4, 3), r(3, 3), r(3)
    for alpha, beta in ((r(1)[0], r(1)[0]), (r(3), r(3))):
        expected = (alpha * text + beta * h) @ W.T + b
        torch.testing.assert_close(gated_fusion(h, text, alpha, beta, W, b), expected)
        torch.testing.assert_close(gated_fusion(h, text, alpha, beta, W, b, residual=True), expected + h)
    Wg, bg = r(6, 6), r(6)
    gates = 1 / (1 + torch.exp(-(torch.cat([text, h], 1) @ Wg.T + bg)))
    expected = (gates[:, :3] * text + gates[:, 3:] * h) @ W.T + b
    torch.testing.assert_close(gated_fusion(h, text, None, None, W, b, gate_weight=Wg, gate_bias=bg), expected)
    torch.testing.assert_close(gated_fusion(h, None, None, None, W, b, residual=True), h @ W.T + b + h)
    leaves = [t.requires_grad_() for t in (h, text, W, b, Wg, bg)]
    assert gradcheck(
        lambda h, t, W, b, Wg, bg: gated_fusion(h, t, None, None, W, b, gate_weight=Wg, gate_bias=bg), leaves
    )
    scalars = [t.requires_grad_() for t in (h, text, r(1)[0], r(1)[0], W, b)]
    assert gradcheck(lambda *a: gated_fusion(*a, residual=True), scalars)


def test_text_is_standardised_over_the_items_that_have_it() -> None:
    table = torch.randn(50, 6) * torch.tensor([1e-3, 1, 10, 1, 1, 1]) + torch.arange(6)
    table[:, 5] = 2.5  # says nothing
    table[[0, 7, 9]] = 0
    scaled = scale_text(table)
    has_text = torch.ones(50, dtype=torch.bool)
    has_text[[0, 7, 9]] = False
    assert not scaled[~has_text].any()
    assert not scaled[:, 5].any()
    torch.testing.assert_close(scaled[has_text, :5].mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled[has_text, :5].std(0, correction=0), torch.ones(5), atol=1e-4, rtol=0)
    assert torch.equal(scale_text(table, "none"), table)
    assert not scale_text(torch.zeros(3, 2)).any()


def test_the_gate_looks_its_text_up_and_normalises_its_result() -> None:
    h, table, W, b, Wg, bg, scale, shift = r(5, 3), r(4, 3), r(3, 3), r(3), r(6, 6), r(6), r(3), r(3)
    ids = torch.tensor([3, 0, 3, 3, 1])
    constants: dict[str, Any] = {"alpha": r(3), "beta": r(1)[0]}
    context: dict[str, Any] = {"alpha": None, "beta": None, "gate_weight": Wg, "gate_bias": bg}
    for gate in (constants, context):
        plain = gated_fusion(h, table[ids], weight=W, bias=b, residual=True, **gate)
        torch.testing.assert_close(gated_fusion(h, table, weight=W, bias=b, residual=True, ids=ids, **gate), plain)
        centred = plain - plain.mean(1, keepdim=True)
        expected = centred / (centred.square().mean(1, keepdim=True) + 1e-3).sqrt() * scale + shift
        norm: dict[str, Any] = {"norm_weight": scale, "norm_bias": shift, "eps": 1e-3}
        y = gated_fusion(h, table, weight=W, bias=b, residual=True, ids=ids, **norm, **gate)
        torch.testing.assert_close(y, expected)
    leaves = [t.requires_grad_() for t in (h, table, W, b, Wg, bg, scale, shift)]
    assert gradcheck(
        lambda h, table, W, b, Wg, bg, scale, shift: gated_fusion(
            h, table, None, None, W, b, ids=ids, gate_weight=Wg, gate_bias=bg, norm_weight=scale, norm_bias=shift
        ),
        leaves,
    )


def test_the_gate_rounds_half_precision_once() -> None:
    tensors = [t.bfloat16() for t in (r(5, 8), r(5, 8), r(8), r(8), r(8, 8), r(8))]
    exact = gated_fusion(*(t.double() for t in tensors), residual=True)
    y = gated_fusion(*tensors, residual=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=1e-5)


def test_packed_scan_starts_anew_at_every_boundary() -> None:
    """Against the unrolled sum of the whole row, in which a decay of e^-1000 cuts the sequences apart."""
    a: dict[str, Any] = {**_arguments(9), "z": None, "D": None, "delta_bias": None, "delta_softplus": False}
    a = {name: value[:1] if isinstance(value, Tensor) and value.dim() == 3 else value for name, value in a.items()}
    a["delta"] = a["delta"].abs()
    a["A"] = -torch.ones(3, 4, dtype=torch.float64)
    cu_seqlens, h0 = torch.tensor([0, 1, 4, 9]), r(3, 3, 4)
    y, last = selective_scan(**a, initial_state=h0, return_last_state=True, cu_seqlens=cu_seqlens)
    steps, u, B, C = (a[name] for name in ("delta", "u", "B", "C"))

    def with_gaps(x: Tensor, gap: float) -> Tensor:
        """A position more in front of every sequence but the first."""
        blank = torch.full_like(x[..., :1], gap)
        return torch.cat([x[..., :1], blank, x[..., 1:4], blank, x[..., 4:]], dim=-1)

    gapped = _unrolled(with_gaps(u, 0.0), with_gaps(steps, 1000.0), a["A"], with_gaps(B, 0.0), with_gaps(C, 0.0))
    for s, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        here = slice(start, end)
        from_start = torch.exp(steps[..., here].cumsum(2)[..., None] * a["A"][:, None])  # [1, e, t, n]
        expected = gapped[..., start + s : end + s]
        expected = expected + torch.einsum("bnt,betn,en->bet", C[..., here], from_start, h0[s])
        torch.testing.assert_close(y[..., here], expected, rtol=1e-12, atol=1e-12)
    final: dict[str, Any] = {
        name: value[..., 4:] if isinstance(value, Tensor) and value.dim() == 3 else value for name, value in a.items()
    }
    _, alone = selective_scan(**final, initial_state=h0[2:], return_last_state=True)
    torch.testing.assert_close(last[2:], alone, rtol=0, atol=0)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("conv_first", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_projection_with_the_convolution_on_either_side(per_row: bool, conv_first: bool, activation: Any) -> None:
    """Filter and convolution as matrices over the positions: one is not causal, the other a band below the diagonal."""
    B, L, C, R, out, width = 2, 7, 3, 4, 5, 4
    x, V, W, b, w, cb = r(B, L, C), r(B, L, R) if per_row else r(L, R), r(out, C), r(out), r(out, width), r(out)
    m = r(R, out if conv_first else C)
    filtered = torch.einsum("btr,rc,bsr->bcts", V.expand(B, L, R), m, V.expand(B, L, R))
    delay = torch.arange(L)[:, None] - torch.arange(L)
    taps = torch.where((delay >= 0) & (delay < width), w[:, (width - 1 - delay).clamp(0, width - 1)], 0.0)  # [o, t, s]

    def convolved(z: Tensor) -> Tensor:
        return torch.einsum("ots,bso->bto", taps, z) + cb

    if conv_first:
        expected = torch.einsum("bots,bso->bto", filtered, convolved(F.linear(x, W, b)))
    else:
        expected = convolved(F.linear(torch.einsum("bcts,bsc->btc", filtered, x), W, b))
    expected = F.silu(expected) if activation else expected
    leaves = [t.requires_grad_() for t in (x, m, W, b, w, cb)]

    def function(x: Tensor, m: Tensor, W: Tensor, b: Tensor, w: Tensor, cb: Tensor) -> Tensor:
        return spectral_projection(
            x, V, m, W, b, conv_weight=w, conv_bias=cb, conv_first=conv_first, activation=activation
        )

    torch.testing.assert_close(function(*leaves), expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(function, leaves)


@pytest.mark.parametrize("n", LENGTHS)
def test_projection_by_fast_transforms_is_the_filter(n: int) -> None:
    x, W, b, theta = r(2, n, 3), r(5, 3), r(5), 0.2
    gain = mask_gain(frequencies(n), theta, "soft", 0.05)
    expected = spectral_filter(x, theta, mask="soft", tau=0.05)
    torch.testing.assert_close(spectral_projection_fft(x, gain), expected, rtol=0, atol=1e-13)
    kept = int(mask_gain(frequencies(n), theta).sum())
    expected = F.linear(spectral_filter(x, theta), W, b)
    torch.testing.assert_close(spectral_projection_fft(x, torch.ones(kept), W, b), expected, rtol=0, atol=1e-13)
    per_channel = gain[:, None] * torch.tensor([1.0, 0.0, 2.0])
    y = spectral_projection_fft(x, per_channel)
    torch.testing.assert_close(y[..., 2], 2 * spectral_projection_fft(x, gain)[..., 2], rtol=0, atol=1e-13)
    assert not y[..., 1].any()


def test_last_state_is_exact_whatever_is_asked_for() -> None:
    a = _arguments(20)
    a["C"], a["z"] = a["C"][..., -1], a["z"][..., -1]
    asked = last_state(**a, exponentials="nodes", nodes=None, splits=7)
    assert torch.equal(asked, last_state(**a))


def _last_scan_arguments(seqlen: int, batch: int = 3, dim: int = 4, dstate: int = 3, dt_rank: int = 2) -> list[Tensor]:
    lengths = torch.tensor([seqlen, 1, max(1, seqlen - 2)])
    return [
        r(batch, seqlen, dim), r(dt_rank + 2 * dstate, dim), r(dim, dt_rank), r(dim), -r(dim, dstate).exp(), r(dim),
        r(batch, dim), lengths,
    ]  # fmt: skip


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_last_scan_is_the_block_position_after_position(seqlen: int, stride: int) -> None:
    p, W, W_dt, bias, A, D, z, lengths = _last_scan_arguments(seqlen)
    got = last_scan(p, W, W_dt, bias, A, D, z, lengths, stride)
    ungated = last_scan(p, W, W_dt, None, A, D, None, lengths, stride)
    for row, n in enumerate(lengths.tolist()):
        u = p[row, (n - 1) % stride : n : stride].sigmoid() * p[row, (n - 1) % stride : n : stride]
        delta, B, C = (u @ W.T).T[None].split([2, 3, 3], dim=1)
        scan = {"u": u.T[None], "delta": W_dt @ delta, "A": A, "B": B, "C": C, "D": D, "delta_softplus": True}
        with_bias, without = selective_scan(**scan, delta_bias=bias), selective_scan(**scan)
        assert isinstance(with_bias, Tensor)
        assert isinstance(without, Tensor)
        torch.testing.assert_close(got[row], with_bias[0, :, -1] * F.silu(z[row]), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(ungated[row], without[0, :, -1], rtol=1e-11, atol=1e-11)
    for row, n in enumerate(lengths.tolist()):
        p[row, n:] = torch.nan
    assert torch.equal(last_scan(p.nan_to_num(7.0), W, W_dt, bias, A, D, z, lengths, stride), got)


@pytest.mark.parametrize("stride", [1, 2])
def test_last_scan_gradients(stride: int) -> None:
    *leaves, lengths = _last_scan_arguments(5, dim=3)

    def function(*args: Any) -> Tensor:
        p, W, W_dt, bias, A, D, z = args
        return last_scan(p, W, W_dt, bias, A, D, z, lengths, stride)

    assert gradcheck(function, [leaf.requires_grad_() for leaf in leaves])
