"""Dropout and LayerNorm of the numba engine: the specification where nothing is drawn, and draws that are random."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests._bounds import assert_as_good, cast, gradients

pytest.importorskip("numba", reason="numba is not installed")

from fastm2rec import ops
from fastm2rec.cpu import dropout_norm as engine
from fastm2rec.cpu.dropout_norm import _backward_op, _forward_op, dropout_norm
from fastm2rec.reference.dropout_norm import dropout_norm as reference

EPS = 1e-12
NAMES = ("x", "de", "dweight", "dbias")


def _inputs(lengths: list[int], dim: int = 64) -> list[Any]:
    e = 0.02 * torch.randn(len(lengths), max(lengths), dim)
    return [e, torch.tensor(lengths), torch.randn(dim), torch.randn(dim)]


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dim", [64, 32, 96])
@pytest.mark.parametrize("lengths", [[7], [50, 1, 13, 50, 2, 49, 50, 50, 8]])
def test_without_dropout_it_is_the_reference(lengths: list[int], dim: int) -> None:
    inputs = _inputs(lengths, dim)
    dy = torch.randn_like(inputs[0])
    got, plain, exact = (
        gradients(partial(f, eps=EPS, dropout=0.0), values, dy)
        for f, values in ((dropout_norm, inputs), (reference, inputs), (reference, cast(inputs, torch.float64)))
    )
    for name, a, b, c in zip(NAMES, got, plain, exact, strict=True):
        assert_as_good(a, b, c, name=name)
    wide: list[Any] = [*cast(inputs, torch.float64)]
    for d, c in zip(gradients(partial(dropout_norm, eps=EPS, dropout=0.0), wide, dy), exact, strict=True):
        torch.testing.assert_close(d, c, rtol=1e-12, atol=1e-12)


def test_with_dropout_it_is_the_reference_of_the_same_draw() -> None:
    """Which numbers are dropped is read off the kernel's own output for known inputs under the same key."""
    e, lengths, weight, bias = (t.double() if t.is_floating_point() else t for t in _inputs([9, 5, 9]))
    torch.manual_seed(3)
    key = int(torch.randint(2**62, ()))
    ones = torch.ones_like(e)
    ones[..., 0] = -31.0  # so that a row has a mean and a spread whatever is dropped
    factors = _factors(ones, lengths, key)
    torch.manual_seed(3)
    inputs = [e, lengths, weight, bias]
    dy = torch.randn(e.shape, generator=torch.Generator().manual_seed(1)).double()
    got = gradients(partial(dropout_norm, eps=1e-9, dropout=0.3), inputs, dy)

    def same(e: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference(e * factors, lengths, weight, bias, 1e-9, 0.0)

    for name, a, b in zip(NAMES, got, gradients(same, inputs, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def _factors(values: Tensor, lengths: Tensor, key: int, p: float = 0.3) -> Tensor:
    """0 where the engine drops a number, 1 / (1 - p) elsewhere: a dropped one stands at minus the mean."""
    dim = values.shape[2]
    x = _forward_op(values, lengths, torch.ones(dim).double(), torch.zeros(dim).double(), EPS, p, key)
    # Of each row's numbers v k, LayerNorm keeps the order; with v = 1 but for the first, what is 0 and what is not
    # differs by one step.
    low, high = x[..., 1:].amin(-1, keepdim=True), x[..., 1:].amax(-1, keepdim=True)
    kept = x > (low + high) / 2
    kept[..., 0] = x[..., 0] < low[..., 0] - 1e-6
    return kept.double() / (1 - p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_draws_are_random(p: float) -> None:
    rows, seqlen, dim = 64, 32, 64
    n = rows * seqlen * dim
    lengths = torch.full((rows,), seqlen)
    ones = torch.ones(rows, seqlen, dim).double()
    ones[..., 0] = -1000.0

    def kept(key: int) -> Tensor:
        return (_factors(ones, lengths, key, p) > 0).double()

    first, second = kept(1), kept(2)
    spread = (p * (1 - p)) ** 0.5
    # Five standard deviations: each of these fails by chance once in two million draws.
    assert abs(first.mean() - (1 - p)) <= 5 * spread / n**0.5
    flat = (first - (1 - p)).flatten()
    for shift in (1, dim, seqlen * dim):
        assert abs((flat[shift:] * flat[:-shift]).mean()) <= 5 * spread**2 / (n - shift) ** 0.5, shift
    assert abs((flat * (second - (1 - p)).flatten()).mean()) <= 5 * spread**2 / n**0.5, "another key"
    for key in (1 + 2**32, 1 + 2**61):
        assert abs((flat * (kept(key) - (1 - p)).flatten()).mean()) <= 5 * spread**2 / n**0.5, "its high bits count"
    per_channel = first.mean((0, 1))
    assert (per_channel - (1 - p)).abs().max() <= 6 * spread / (rows * seqlen) ** 0.5


def test_draws_come_from_torchs_generator_and_not_from_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs([50, 7, 50, 31] * 5)

    def draw(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return gradients(partial(dropout_norm, eps=EPS, dropout=0.5), inputs, torch.ones_like(inputs[0]))

    first = draw(0)
    assert not torch.equal(draw(1)[0], first[0])
    monkeypatch.setattr(engine, "NUMBERS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = draw(0)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_evaluation_draws_nothing() -> None:
    inputs = _inputs([5])
    state = torch.get_rng_state()
    e, lengths, weight, bias = inputs
    dropout_norm(e, lengths, weight, bias, EPS, 0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_custom_ops() -> None:
    e, lengths, weight, bias = _inputs([5, 3], 32)
    e.requires_grad_()
    torch.library.opcheck(_forward_op, (e, lengths, weight, bias, EPS, 0.2, 7))
    torch.library.opcheck(_backward_op, (e.detach(), e.detach(), lengths, weight, EPS, 0.2, 7))


def test_where_the_kernel_cannot_run_it_is_the_reference() -> None:
    e, lengths, weight, bias = _inputs([5, 3], 20)
    assert torch.equal(dropout_norm(e, lengths, weight, bias, EPS, 0.0), reference(e, lengths, weight, bias, EPS, 0.0))
    e, lengths, weight, bias = (t.bfloat16() if t.is_floating_point() else t for t in _inputs([5, 3]))
    assert torch.equal(dropout_norm(e, lengths, weight, bias, EPS, 0.0), reference(e, lengths, weight, bias, EPS, 0.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"e": torch.zeros(2, 3)}, r"e: expected shape \[B, L, C\], got \[2, 3\]"),
        ({"weight": torch.zeros(5)}, r"weight: expected shape \[C=8\], got \[5\]"),
        ({"lengths": torch.tensor([4, 1])}, "lengths: expected values from 1 to 3, got 1 to 4"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "e": torch.zeros(2, 3, 8), "lengths": torch.tensor([3, 1]), "weight": torch.ones(8), "bias": torch.ones(8),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.dropout_norm(**{**arguments, **change})
