"""`filtered_last_scan`: the numba engine, which makes each row in the cache, against the two ops in turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastm2rec.basis import row_basis
from fastm2rec.reference.filtered_last_scan import filtered_last_scan as reference
from tests._bounds import assert_as_good_on_average, cast, gradients

pytest.importorskip("numba", reason="numba is not installed")

from fastm2rec.cpu import last_scan as engine
from fastm2rec.cpu.filtered_last_scan import filtered_last_scan

NAMES = (
    "y", "x", "mask", "weight", "bias", "conv_weight", "conv_bias", "x_proj_weight", "dt_proj_weight", "dt_proj_bias",
    "A", "D", "z",
)  # fmt: skip
DRAWS = 8


def _inputs(seqlen: int, dim: int = 32, *, channels: int = 12, dstate: int = 3, optional: bool = True) -> list[Any]:
    """All but basis, lengths and stride, in the order of NAMES; step sizes about 0.1."""
    batch, columns, dt_rank = 5, 2 * int(0.1 * seqlen) + 1, 3
    r = torch.randn
    return [
        r(batch, seqlen, channels), torch.rand(columns) if optional else None,
        r(dim, channels) * channels**-0.5, r(dim) if optional else None, r(dim, 4),
        r(dim) if optional else None, r(dt_rank + 2 * dstate, dim) * dim**-0.5, r(dim, dt_rank) * 0.5,
        torch.rand(dim) * 3 - 4 if optional else None, -torch.arange(1.0, dstate + 1) * torch.exp(0.1 * r(dim, dstate)),
        r(dim), r(batch, dim) if optional else None,
    ]  # fmt: skip


def _basis(seqlen: int, kind: Any = "fourier") -> Tensor:
    columns = 2 * int(0.1 * seqlen) + 1
    return row_basis(torch.tensor([seqlen]), seqlen, columns, kind, torch.float64)[0]


def _lengths(seqlen: int) -> Tensor:
    return torch.tensor([seqlen, 1, max(1, seqlen // 2), max(1, seqlen - 1), min(3, seqlen)])


def _call(function: Any, basis: Tensor, lengths: Tensor, stride: int, *values: Any) -> Tensor:
    x, *rest = values
    return function(x, lengths, basis.to(x.dtype), *rest, stride)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize(
    ("seqlen", "dim", "stride", "optional", "kind"),
    [
        (50, 64, 1, True, "fourier"),
        (51, 32, 2, True, "fourier"),
        (200, 32, 1, False, "fourier"),
        (201, 32, 3, True, "fourier"),
        (7, 32, 1, True, "fourier"),
        (50, 32, 1, True, "dct"),
        (50, 20, 1, True, "fourier"),
    ],
)
def test_values_and_gradients(seqlen: int, dim: int, stride: int, optional: bool, kind: str) -> None:
    _compare(partial(_inputs, seqlen, dim, optional=optional), _basis(seqlen, kind), stride)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("channels", [32, 64, 96])
@pytest.mark.parametrize("seqlen", [20, 200])  # whose bases are multiplied as they are, and by their orbits
def test_input_channels_in_whole_lanes(seqlen: int, channels: int) -> None:
    _compare(partial(_inputs, seqlen, channels=channels), _basis(seqlen), 1)


def _compare(draw: Callable[[], list[Any]], basis: Tensor, stride: int) -> None:
    """Values and gradients of the engine and of the reference."""
    arguments = (basis, _lengths(len(basis)), stride)
    draws: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for _ in range(DRAWS):
        inputs = draw()
        dy = torch.randn(5, inputs[2].shape[0])
        got, plain, close, exact = (
            gradients(partial(_call, function, *arguments), cast(inputs, dtype), dy)
            for dtype in (torch.float32, torch.float64)
            for function in (filtered_last_scan, reference)
        )
        present = [name for name, value in zip(NAMES, [dy, *inputs], strict=True) if value is not None]
        for name, a, b, c, d in zip(present, got, plain, exact, close, strict=True):
            draws.setdefault(name, []).append((a, b, c))
            assert (d - c).abs().max() <= 1e-13 * c.abs().max(), name
    for name, values in draws.items():
        assert_as_good_on_average(values, name=name)


def test_nothing_as_large_as_the_convolution_is_made() -> None:
    """All that is kept for the gradient is smaller than [B, L, E]."""
    inputs = [value if value is None else value.requires_grad_() for value in _inputs(200, 64)]
    kept: list[int] = []

    def look(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with saved_tensors_hooks(look, lambda x: x):
        y = _call(filtered_last_scan, _basis(200), _lengths(200), 1, *inputs)
    y.sum().backward()
    assert kept
    assert max(kept) < 5 * 200 * 64


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    inputs, basis, lengths, dy = _inputs(50), _basis(50), _lengths(50), torch.randn(5, 32)
    expected = gradients(partial(_call, filtered_last_scan, basis, lengths, 1), inputs, dy)
    monkeypatch.setattr(engine, "SLICE", 1)
    threads(3)
    got = gradients(partial(_call, filtered_last_scan, basis, lengths, 1), inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    single = [inputs[0][3:4], *inputs[1:-1], inputs[-1][3:4]]
    y, dx, *_ = gradients(partial(_call, filtered_last_scan, basis, lengths[3:4], 1), single, dy[3:4])
    assert torch.equal(y[0], expected[0][3])
    assert torch.equal(dx[0], expected[1][3])


def test_a_length_that_nobody_checked() -> None:
    inputs, basis, lengths, dy = _inputs(50), _basis(50), _lengths(50), torch.randn(5, 32)
    y, dx, *_ = gradients(partial(_call, filtered_last_scan, basis, lengths, 1), inputs, dy)
    for wrong in (0, -3, 51, 2**40):
        lengths[1] = wrong
        bad_y, bad_dx, *_ = gradients(partial(_call, filtered_last_scan, basis, lengths, 1), inputs, dy)
        assert bad_y[1].isnan().all()
        assert bad_dx[1].isnan().all()
        assert torch.equal(bad_y[2], y[2])
        assert torch.equal(bad_dx[2], dx[2])


def test_without_gradients_nothing_is_kept() -> None:
    inputs, basis, lengths = _inputs(50), _basis(50), _lengths(50)
    expected = gradients(partial(_call, filtered_last_scan, basis, lengths, 1), inputs, torch.randn(5, 32))[0]
    y = _call(filtered_last_scan, basis, lengths, 1, *inputs)
    assert torch.equal(y, expected)
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(_call(filtered_last_scan, basis, lengths, 1, *inputs), expected)


def test_only_the_gradients_that_are_asked_for() -> None:
    inputs, dy = _inputs(50), torch.randn(5, 32)
    call = partial(_call, filtered_last_scan, _basis(50), _lengths(50), 1)
    whole = gradients(call, inputs, dy)[1:]
    for i, gradient in enumerate(whole):
        leaves = [value.detach().requires_grad_(i == j) for j, value in enumerate(inputs)]
        y = call(*leaves)
        y.backward(dy)
        torch.testing.assert_close(leaves[i].grad, gradient, rtol=1e-5, atol=1e-5, msg=NAMES[i + 1])


def test_autocast_and_mixed_dtypes_are_the_two_ops_in_turn() -> None:
    inputs = _inputs(50)
    call = partial(_call, filtered_last_scan, _basis(50), _lengths(50), 1)
    expected = call(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        low = call(*inputs)
    assert low.dtype == torch.float32
    scale = expected.abs().max()
    assert 0 < (low - expected).abs().max() <= 0.1 * scale  # some roundings to 8 bits
    mixed = [inputs[0].bfloat16(), *inputs[1:]]
    assert (call(*mixed).float() - expected).abs().max() <= 0.1 * scale


def test_a_gradient_of_the_gradient_is_refused() -> None:
    inputs = [value.requires_grad_() for value in _inputs(20)]
    y = _call(filtered_last_scan, _basis(20), _lengths(20), 1, *inputs)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
