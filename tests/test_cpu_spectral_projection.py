"""The filter with the convolution inside its matrix products, against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastm2rec.basis import row_basis
from fastm2rec.cpu import spectral_projection as module
from fastm2rec.cpu.fourier_conv import _backward_op, _forward_op
from fastm2rec.cpu.spectral_projection import spectral_projection
from fastm2rec.reference.spectral_projection import spectral_projection as reference
from tests._bounds import SLACK, assert_as_good, cast, gradients

MASKS = ("none", "R", "BR", "RC")
# So many channels that plain PyTorch's largest error, which makes the bound, is no luck: the gradient of a bias of five
# channels, five sums over positions, was all but exact on one processor.
BATCH, CHANNELS = 3, 48


def _inputs(seqlen: int, columns: int, width: int, mask: str, *, per_row: bool, conv_first: bool) -> list[Any]:
    """x, basis, mask, weight, bias, conv_weight, conv_bias in float64."""
    B, C, E = BATCH, 4, CHANNELS

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    masks = {"none": None, "R": r(columns), "BR": r(B, columns), "RC": r(columns, E if conv_first else C)}
    basis, _ = torch.linalg.qr(r(B, seqlen, columns) if per_row else r(seqlen, columns))
    return [r(B, seqlen, C), basis, masks[mask], r(E, C), r(E), r(E, width), r(E)]


def _call(function: Any, inputs: list[Any], **options: Any) -> Tensor:
    *positional, conv_weight, conv_bias = inputs
    return function(*positional, conv_weight=conv_weight, conv_bias=conv_bias, **options)


@pytest.mark.parametrize(
    ("per_row", "mask", "conv_first"), list(itertools.product([False, True], MASKS, [False, True]))
)
@pytest.mark.parametrize(("seqlen", "columns", "width"), [(50, 11, 4), (7, 2, 3), (1, 1, 1), (9, 2, 1)])
def test_values_and_gradients(
    seqlen: int, columns: int, width: int, per_row: bool, mask: str, conv_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"conv_first": conv_first, "activation": "silu"}
    monkeypatch.setattr(module, "reference", None)  # it must not be asked
    draws = []
    for _ in range(8 if seqlen == 1 else 1):  # the gradient of a basis of one number is one sum, and luck
        inputs = _inputs(seqlen, columns, width, mask, per_row=per_row, conv_first=conv_first)
        dy = torch.randn(BATCH, seqlen, CHANNELS)
        exact = gradients(lambda *args: _call(reference, list(args), **options), inputs, dy.double())
        single = cast(inputs, torch.float32)
        plain = gradients(lambda *args: _call(reference, list(args), **options), single, dy)
        got = gradients(lambda *args: _call(spectral_projection, list(args), **options), single, dy)
        double = gradients(lambda *args: _call(spectral_projection, list(args), **options), inputs, dy.double())
        for a, b in zip(double, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        draws.append((got, plain, exact))
    together = ([torch.stack(draw) for draw in zip(*results, strict=True)] for results in zip(*draws, strict=True))
    for place, (a, b, c) in enumerate(zip(*together, strict=True)):
        # Its sums have up to 4 times as many terms, hence twice the error, and each term has one more rounding (w * W).
        assert_as_good(a, b, c, slack=2 * SLACK, name=f"result {place}")


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("seqlen", "columns", "width"),
    [(50, 11, 4), (50, 50, 4), (51, 51, 3), (7, 3, 4), (3, 3, 4), (2, 1, 2), (201, 41, 4)],
)
def test_convolution_in_the_frequency_domain(
    seqlen: int, columns: int, width: int, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Fourier basis over all slots; 64 channels, as the kernel takes whole tiles."""
    B, C, E = 9, 5, 64

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    basis = row_basis(torch.tensor([seqlen]), seqlen, columns, "fourier", torch.float64)[0]
    masks = {"none": None, "R": r(columns), "BR": r(B, columns), "RC": r(columns, E)}
    inputs: list[Any] = [r(B, seqlen, C), basis, masks[mask], r(E, C), r(E), r(E, width), r(E)]
    dy = torch.randn(B, seqlen, E)
    options = {"conv_first": True, "activation": "silu"}
    exact = gradients(lambda *args: _call(reference, list(args), **options), inputs, dy.double())
    single = cast(inputs, torch.float32)
    plain = gradients(lambda *args: _call(reference, list(args), **options), single, dy)
    monkeypatch.setattr(module, "reference", None)
    monkeypatch.setattr(module, "_filter_last", None)
    # The basis is data: it gets no gradient, and none is asked for.
    got = _gradients_but_for_the_basis(single, dy, options)
    double = _gradients_but_for_the_basis(inputs, dy.double(), options)
    del exact[2], plain[2]
    for place, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        assert_as_good(a, b, c, slack=2 * SLACK, name=f"result {place}")
    for a, b in zip(double, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def _gradients_but_for_the_basis(inputs: list[Any], dy: Tensor, options: dict[str, Any]) -> list[Tensor]:
    basis = inputs[1]
    others = [value for place, value in enumerate(inputs) if place != 1]
    return gradients(
        lambda *args: _call(spectral_projection, [args[0], basis, *args[1:]], **options), others, dy
    )  # fmt: skip


def test_a_basis_is_recognised_by_its_values() -> None:
    def recognised(basis: Tensor, dim: int = 32) -> bool:
        return module.fourier_products(basis, torch.zeros(dim, 4), torch.float32) is not None

    basis = row_basis(torch.tensor([20]), 20, 5, "fourier")[0]
    assert recognised(basis)
    basis[3, 2] += 1e-3
    assert not recognised(basis), "changed in place"
    assert not recognised(row_basis(torch.tensor([20]), 20, 5, "dct")[0])
    assert not recognised(row_basis(torch.tensor([19]), 20, 5, "fourier")[0]), "a row's own length"
    assert not recognised(row_basis(torch.tensor([20]), 20, 5, "fourier")[0], dim=31)


def test_a_basis_first_seen_in_inference_mode_can_be_trained_with() -> None:
    basis = row_basis(torch.tensor([100]), 100, 21, "fourier")[0]
    inputs: list[Any] = [
        torch.randn(3, 100, 8), basis, None, torch.randn(32, 8, requires_grad=True), None, torch.randn(32, 4), None
    ]  # fmt: skip
    with torch.inference_mode():
        first = _call(spectral_projection, inputs, conv_first=True)
    second = _call(spectral_projection, inputs, conv_first=True)
    second.sum().backward()
    assert torch.equal(first, second.detach())
    assert inputs[3].grad.isfinite().all()


def test_under_autocast_products_are_half_precision_and_nothing_breaks() -> None:
    basis = row_basis(torch.tensor([50]), 50, 11, "fourier")[0]
    inputs: list[Any] = [
        torch.randn(3, 50, 8), basis, torch.rand(11), torch.randn(32, 8), None, torch.randn(32, 4), torch.randn(32)
    ]  # fmt: skip
    exact = _call(reference, cast(inputs, torch.float64), conv_first=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = _call(spectral_projection, inputs, conv_first=True)
    half = cast(inputs, torch.bfloat16)
    plain = _call(reference, half, conv_first=True)
    assert_as_good(got.bfloat16(), plain, exact)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        basis = row_basis(torch.tensor([50]), 50, 11, "fourier")[0]
        inputs: list[Any] = [torch.randn(3, 50, 8), basis, None, torch.randn(32, 8), None, torch.randn(32, 4), None]
        got, plain = (_call(f, inputs, conv_first=True) for f in (spectral_projection, reference))
        assert_as_good(got, plain, _call(reference, cast(inputs, torch.float64), conv_first=True))


def test_custom_ops_of_the_frequency_domain() -> None:
    basis = row_basis(torch.tensor([9]), 9, 5, "fourier")[0]
    x, taps = torch.randn(2, 8, 32, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    torch.library.opcheck(_forward_op, (x, taps, basis))
    torch.library.opcheck(_backward_op, (torch.randn(2, 5, 32), x.detach(), taps.detach(), basis))


@pytest.mark.parametrize("absent", [4, 6])
@pytest.mark.parametrize("conv_first", [False, True])
def test_biases_are_optional(absent: int, conv_first: bool) -> None:
    inputs = _inputs(20, 3, 4, "R", per_row=False, conv_first=conv_first)
    inputs[absent] = None
    got, expected = (_call(f, inputs, conv_first=conv_first) for f in (spectral_projection, reference))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("conv_first", [False, True])
@pytest.mark.parametrize(
    ("seqlen", "columns", "without"), [(9, 9, ()), (9, 3, ()), (20, 3, (3, 4)), (20, 3, (5, 6)), (20, 3, (3, 4, 5, 6))]
)
def test_elsewhere_it_is_the_reference(seqlen: int, columns: int, without: tuple[int, ...], conv_first: bool) -> None:
    inputs = _inputs(seqlen, columns, 4, "none", per_row=False, conv_first=conv_first)
    if 3 in without:
        inputs[5], inputs[6] = torch.randn(4, 4, dtype=torch.float64), None
    for place in without:
        inputs[place] = None
    conv_first = conv_first and inputs[5] is not None
    got, expected = (_call(f, inputs, conv_first=conv_first) for f in (spectral_projection, reference))
    assert torch.equal(got, expected)


def test_half_precision_is_computed_in_float32() -> None:
    inputs = cast(_inputs(50, 11, 4, "R", per_row=False, conv_first=True), torch.bfloat16)
    exact = _call(reference, cast(inputs, torch.float64), conv_first=True)
    assert_as_good(
        _call(spectral_projection, inputs, conv_first=True), _call(reference, inputs, conv_first=True), exact
    )
