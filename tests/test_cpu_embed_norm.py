"""Dropout and LayerNorm of the numba engine: the specification where nothing is drawn, and draws that are random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests._bounds import assert_as_good, cast, gradients

pytest.importorskip("numba", reason="numba is not installed")

from fastm2rec import ops
from fastm2rec.cpu import embed_norm as engine
from fastm2rec.cpu.embed_norm import _backward_op, _forward_op, embed_norm
from fastm2rec.reference.embed_norm import embed_norm as reference

EPS = 1e-12
ITEMS = 30  # so that most occur more than once, and some not at all
NAMES = ("x", "newest", "dtable", "dweight", "dbias")


def _inputs(lengths: list[int], dim: int = 64) -> list[Any]:
    ids = torch.randint(0, ITEMS, (len(lengths), max(lengths)))
    return [ids, torch.tensor(lengths), 0.02 * torch.randn(ITEMS, dim), torch.randn(dim), torch.randn(dim)]


def _results(function: Any, inputs: list[Any], dx: Tensor, dnewest: Tensor, dropout: float = 0.0) -> list[Tensor]:
    """Both outputs, and the gradients of the table, weight and bias."""
    found: list[Tensor] = []

    def last_two(*values: Any) -> Tensor:
        found[:] = function(*values, EPS, dropout)
        return torch.cat([found[0].flatten(), found[1].flatten()])

    _, *graded = gradients(last_two, inputs, torch.cat([dx.flatten(), dnewest.flatten()]))
    return [*(value.detach() for value in found), *graded]


def _gradients_of_outputs(inputs: list[Any]) -> tuple[Tensor, Tensor]:
    (rows, seqlen), dim = inputs[0].shape, inputs[2].shape[1]
    return torch.randn(rows, seqlen, dim), torch.randn(rows, dim)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dim", [64, 32, 96])
@pytest.mark.parametrize("lengths", [[1], [7], [50, 1, 13, 50, 2, 49, 50, 50, 8]])
def test_without_dropout_it_is_the_reference(lengths: list[int], dim: int) -> None:
    inputs = _inputs(lengths, dim)
    dx, dnewest = _gradients_of_outputs(inputs)
    wide: list[Any] = cast(inputs, torch.float64)
    got, plain, exact, double = (
        _results(f, values, dx.to(values[2].dtype), dnewest.to(values[2].dtype))
        for f, values in ((embed_norm, inputs), (reference, inputs), (reference, wide), (embed_norm, wide))
    )
    for name, a, b, c, d in zip(NAMES, got, plain, exact, double, strict=True):
        assert_as_good(a, b, c, name=name)
        torch.testing.assert_close(d, c, rtol=1e-12, atol=1e-12)


def test_ids_behind_the_length_do_not_matter() -> None:
    inputs = _inputs([5, 2, 5])
    other = [inputs[0].clone(), *inputs[1:]]
    other[0][1, 2:] = 0
    given = _gradients_of_outputs(inputs)
    for a, b in zip(_results(embed_norm, inputs, *given), _results(embed_norm, other, *given), strict=True):
        assert torch.equal(a, b)


def test_inputs_of_any_strides() -> None:
    inputs = _inputs([9, 4, 9, 1])
    loose = [inputs[0].t().contiguous().t(), inputs[1], inputs[2].t().contiguous().t(), *inputs[3:]]
    dx, dnewest = _gradients_of_outputs(inputs)
    loose_dx = dx.transpose(0, 2).contiguous().transpose(0, 2)
    for a, b in zip(
        _results(embed_norm, inputs, dx, dnewest), _results(embed_norm, loose, loose_dx, dnewest), strict=True
    ):
        assert torch.equal(a, b)


def test_with_dropout_it_is_the_reference_of_the_same_draw() -> None:
    """Which numbers are dropped is read off the kernel's own output for known inputs under the same key.

    Each place has an item of its own: the reference's table can then be thinned out beforehand.
    """
    seqlen, dim = 9, 64
    lengths = torch.tensor([9, 5, 9])
    ids = torch.arange(3 * seqlen).view(3, seqlen)
    table, weight, bias = torch.randn(3 * seqlen, dim).double(), torch.randn(dim).double(), torch.randn(dim).double()
    torch.manual_seed(3)
    key = int(torch.randint(2**62, ()))
    ones = torch.ones_like(table)
    ones[..., 0] = -31.0  # so that a row has a mean and a spread whatever is dropped
    factors = _factors(ones, ids, lengths, key).flatten(0, 1)
    inputs = [ids, lengths, table, weight, bias]
    given = [d.double() for d in _gradients_of_outputs(inputs)]
    torch.manual_seed(3)
    got = _results(embed_norm, inputs, given[0], given[1], 0.3)

    def same(ids: Tensor, lengths: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return reference(ids, lengths, table * factors, *rest)

    for name, a, b in zip(NAMES, got, _results(same, inputs, given[0], given[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def _factors(table: Tensor, ids: Tensor, lengths: Tensor, key: int, p: float = 0.3) -> Tensor:
    """0 where the engine drops a number, 1 / (1 - p) elsewhere: a dropped one stands at minus the mean."""
    dim = table.shape[1]
    x, _ = _forward_op(ids, lengths, table, torch.ones(dim).double(), torch.zeros(dim).double(), EPS, p, key)
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
    lengths, ids = torch.full((rows,), seqlen), torch.zeros(rows, seqlen, dtype=torch.int64)
    ones = torch.ones(1, dim).double()
    ones[..., 0] = -1000.0

    def kept(key: int) -> Tensor:
        return (_factors(ones, ids, lengths, key, p) > 0).double()

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


def test_draws_come_from_torchs_generator_and_not_from_threads(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    inputs = _inputs([50, 7, 50, 31] * 5)
    given = _gradients_of_outputs(inputs)

    def draw(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return _results(embed_norm, inputs, *given, 0.5)

    first = draw(0)
    assert not torch.equal(draw(1)[0], first[0])
    monkeypatch.setattr(engine, "NUMBERS", 1)
    threads(3)
    again = draw(0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_evaluation_draws_nothing() -> None:
    ids, lengths, table, weight, bias = _inputs([5])
    state = torch.get_rng_state()
    embed_norm(ids, lengths, table, weight, bias, EPS, 0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_do_not_depend_on_their_batch() -> None:
    ids, lengths, table, weight, bias = _inputs([50, 7, 50, 31] * 5)
    x, newest = embed_norm(ids, lengths, table, weight, bias, EPS, 0.0)
    alone, last = embed_norm(ids[5:6], lengths[5:6], table, weight, bias, EPS, 0.0)
    assert torch.equal(alone[0], x[5])
    assert torch.equal(last[0], newest[5])


def test_custom_ops() -> None:
    ids, lengths, table, weight, bias = _inputs([5, 3], 32)
    dx, dnewest = _gradients_of_outputs([ids, lengths, table])
    torch.library.opcheck(_forward_op, (ids, lengths, table.requires_grad_(), weight, bias, EPS, 0.2, 7))
    torch.library.opcheck(_backward_op, (dx, dnewest, ids, lengths, table.detach(), weight, EPS, 0.2, 7))


@pytest.mark.parametrize(("dim", "dtype"), [(20, torch.float32), (64, torch.bfloat16)])
def test_where_the_kernel_cannot_run_it_is_the_reference(dim: int, dtype: torch.dtype) -> None:
    ids, lengths, table, weight, bias = _inputs([5, 3], dim)
    low = table.to(dtype), weight.to(dtype), bias.to(dtype)
    for a, b in zip(embed_norm(ids, lengths, *low, EPS, 0.0), reference(ids, lengths, *low, EPS, 0.0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_ids": torch.zeros(3, dtype=torch.int64)}, r"item_ids: expected shape \[B, L\], got \[3\]"),
        ({"item_ids": torch.zeros(2, 3)}, "item_ids: expected int64 on cpu, got torch.float32 on cpu"),
        ({"item_ids": torch.tensor([[1, 2, 4], [1, 4, 5]])}, "item_ids: expected 0 to 4, got 1 to 5"),
        ({"item_ids": torch.tensor([[1, 2, 4], [-1, 0, 0]])}, "item_ids: expected 0 to 4, got -1 to 4"),
        ({"table": torch.zeros(5)}, r"table: expected shape \[V, C\], got \[5\]"),
        ({"weight": torch.zeros(5)}, r"weight: expected shape \[C=8\], got \[5\]"),
        ({"lengths": torch.tensor([4, 1])}, "lengths: expected values from 1 to 3, got 1 to 4"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "item_ids": torch.tensor([[1, 2, 4], [3, 0, 0]]), "lengths": torch.tensor([3, 1]), "table": torch.zeros(5, 8),
        "weight": torch.ones(8), "bias": torch.ones(8),
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        ops.embed_norm(**{**arguments, **change})
