"""The loss over the catalogue by the numba engine, against its formula in float64 and torch's in the same dtype."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests._bounds import assert_as_good, cast, gradients

pytest.importorskip("numba", reason="numba is not installed")

from fastm2rec import ops
from fastm2rec.cpu import cross_entropy as engine
from fastm2rec.cpu.arrays import scratch
from fastm2rec.cpu.compiler import entry
from fastm2rec.cpu.cross_entropy import _op, cross_entropy
from fastm2rec.cpu.tiles import COLUMNS, ROWS, multiply
from fastm2rec.reference.cross_entropy import cross_entropy as reference

NAMES = ("loss", "dquery", "dweight")


def _inputs(rows: int, n_items: int, dim: int = 64, spread: float = 1.0) -> list[Any]:
    return [spread * torch.randn(rows, dim), torch.randn(n_items + 1, dim), torch.randint(1, n_items + 1, (rows,))]


def _written_out(query: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    scores = query @ weight[1:].t()
    each = scores.logsumexp(dim=1) - scores[torch.arange(len(query)), targets - 1]
    return each.mean() if reduction == "mean" else each.sum()


def _assert_as_good(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    for name, a, b, c in zip(NAMES, found, plain, exact, strict=True):
        one = name == "loss"  # a loss near 0 is the logarithm of a sum near 1, and as uncertain as 1
        assert_as_good(a + one, b + one, c + one, name=name)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize(
    ("rows", "n_items", "dim"),
    [(1, 50, 32), (5, 95, 64), (31, 96, 96), (32, 97, 64), (33, 2000, 64), (257, 501, 32), (300, 3001, 64)],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_and_gradients(rows: int, n_items: int, dim: int, reduction: str) -> None:
    inputs = _inputs(rows, n_items, dim)
    one = torch.tensor(0.7)
    found, plain, exact = (
        gradients(partial(f, reduction=reduction), values, one)
        for f, values in (
            (cross_entropy, inputs), (reference, inputs), (_written_out, cast(inputs, torch.float64)),
        )
    )  # fmt: skip
    _assert_as_good(found, plain, exact)
    wide = gradients(partial(cross_entropy, reduction=reduction), cast(inputs, torch.float64), one)
    for a, c in zip(wide, exact, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


def test_scores_far_apart() -> None:
    """exp of what is 100 below the greatest score is nothing, wherever in the catalogue the greatest is."""
    inputs = _inputs(40, 700, spread=8.0)
    inputs[2][:7] = 700
    plain, found = (gradients(partial(f, reduction="sum"), inputs, torch.ones(())) for f in (reference, cross_entropy))
    exact = gradients(partial(_written_out, reduction="sum"), cast(inputs, torch.float64), torch.ones(()))
    _assert_as_good(found, plain, exact)


def test_nan_is_not_lost() -> None:
    for which in (0, 1):
        inputs = _inputs(40, 300)
        inputs[which][17, 3] = torch.nan
        assert cross_entropy(inputs[0], inputs[1], inputs[2], "mean").isnan()


def test_inputs_of_any_strides() -> None:
    query, weight, targets = _inputs(40, 300)
    loose = [
        torch.stack([query, query], 2)[:, :, 0],
        weight.t().contiguous().t(),
        torch.stack([targets, targets], 1)[:, 1],
    ]
    assert not any(tensor.is_contiguous() for tensor in loose)
    one = torch.ones(())
    for a, b in zip(
        gradients(partial(cross_entropy, reduction="sum"), [query, weight, targets], one),
        gradients(partial(cross_entropy, reduction="sum"), loose, one),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("graded", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_asked_for(graded: tuple[bool, bool]) -> None:
    query, weight, targets = _inputs(70, 400)
    whole = gradients(partial(cross_entropy, reduction="mean"), [query, weight, targets], torch.ones(()))
    leaves = [tensor.clone().requires_grad_(wanted) for tensor, wanted in zip((query, weight), graded, strict=True)]
    loss = cross_entropy(leaves[0], leaves[1], targets, "mean")
    assert torch.equal(loss, whole[0])
    assert loss.requires_grad == any(graded)
    if any(graded):
        loss.backward()
    for leaf, wanted, gradient in zip(leaves, graded, whole[1:], strict=True):
        assert torch.equal(leaf.grad, gradient) if wanted else leaf.grad is None


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_backward_twice(factor: float) -> None:
    """What a graph keeps for a second time is not what the first one added to."""
    query, weight, targets = _inputs(40, 300)
    once = gradients(partial(cross_entropy, reduction="sum"), [query, weight, targets], torch.tensor(factor))
    leaves = query.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = factor * cross_entropy(*leaves, targets, "sum")
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        for leaf, gradient in zip(leaves, once[1:], strict=True):
            torch.testing.assert_close(leaf.grad, times * gradient)


def test_repeats_threads_and_batches(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    """Bit-equal again, on more threads, and a row's gradient in another batch."""
    inputs = _inputs(70, 900)
    run = partial(gradients, partial(cross_entropy, reduction="sum"), dy=torch.ones(()))
    first = run(inputs)
    monkeypatch.setattr(engine, "MULTIPLY_ADDS", 1)
    threads(3)
    again = run(inputs)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    alone = run([inputs[0][9:10], inputs[1], inputs[2][9:10]])
    assert torch.equal(alone[1][0], first[1][9])
    monkeypatch.setattr(engine, "MOST_ROWS", 32)
    assert torch.equal(run(inputs)[1], first[1])


def test_the_scratch_of_a_larger_catalogue_serves_a_smaller_one() -> None:
    query, weight, targets = _inputs(40, 30)
    expected = cross_entropy(query, weight, targets, "sum")
    many = _inputs(100, 3000)
    cross_entropy(many[0], many[1], many[2], "sum")
    with scratch(1, torch.float32, "cross_entropy") as memory:
        assert memory.size > 100 * 3000
        memory.fill(np.nan)
    assert torch.equal(cross_entropy(query, weight, targets, "sum"), expected)


def test_custom_op() -> None:
    query, weight, targets = _inputs(5, 40, 32)
    leaves = query.requires_grad_(), weight.requires_grad_(), targets
    torch.library.opcheck(_op, (*leaves, 1.0, True, True))
    torch.library.opcheck(_op, (*leaves, 0.5, False, True))


def test_compiles_whole() -> None:
    query, weight, targets = _inputs(8, 40, 32)
    run = partial(gradients, dy=torch.ones(()))
    eager = run(lambda q, w: 2 * ops.cross_entropy(q, w, targets), [query, weight])
    compiled = torch.compile(lambda q, w: 2 * ops.cross_entropy(q, w, targets), fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, run(compiled, [query, weight]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 32), (torch.float32, 40)])
def test_elsewhere_it_is_the_reference(dtype: torch.dtype, dim: int) -> None:
    query, weight, targets = _inputs(9, 20, dim)
    query, weight = query.to(dtype), weight.to(dtype)
    assert torch.equal(cross_entropy(query, weight, targets, "mean"), reference(query, weight, targets, "mean"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(3)}, r"query: expected shape \[B, D\], got \[3\]"),
        ({"weight": torch.ones(8, 31)}, r"weight: expected shape .*D=32\], got \[8, 31\]"),
        ({"weight": torch.ones(1, 32)}, "weight: expected a row for padding and at least one item"),
        ({"weight": torch.ones(8, 32).double()}, "weight: expected torch.float32, that of query, got torch.float64"),
        ({"targets": torch.tensor([1, 8, 2])}, "targets: expected items from 1 to 7, got 1 to 8"),
        ({"targets": torch.tensor([1, 0, 2])}, "targets: expected items from 1 to 7, got 0 to 2"),
        ({"targets": torch.ones(3, dtype=torch.int32)}, "targets: expected int64 on cpu, got torch.int32"),
        ({"targets": torch.ones(4, dtype=torch.int64)}, r"targets: expected shape \[B=3\], got \[4\]"),
        ({"reduction": "none"}, "reduction: expected 'mean' or 'sum', got 'none'"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    values = {"query": torch.ones(3, 32), "weight": torch.ones(8, 32), "targets": torch.tensor([1, 7, 2])}
    with pytest.raises((TypeError, ValueError), match=message):
        ops.cross_entropy(**values | change)


@entry
def _multiplied(a, a_row, a_step, rows, b, b_step, columns, depth, out, out_row, more):
    multiply(a, 0, a_row, a_step, rows, b, 0, b_step, columns, depth, out, 0, out_row, more)


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, 2 * ROWS + 1])
@pytest.mark.parametrize("columns", [COLUMNS, 3 * COLUMNS, 96])
def test_matrix_products(rows: int, columns: int) -> None:
    depth, gap = 7, 5
    a, b = np.random.default_rng(0).normal(size=(rows, depth)), np.random.default_rng(1).normal(size=(depth, columns))
    padded = np.pad(b, ((0, 0), (0, gap)), constant_values=np.nan)
    for more in (False, True):
        for flat, steps in ((a, (depth, 1)), (a.T.copy(), (1, rows))):
            out = np.full((rows, columns + gap), 2.0 if more else np.nan)
            out[:, columns:] = -1.0
            _multiplied(
                flat.ravel(), *steps, rows, padded.ravel(), columns + gap, columns, depth, out.reshape(-1),
                columns + gap, more,
            )  # fmt: skip
            np.testing.assert_allclose(out[:, :columns], a @ b + 2.0 * more, rtol=1e-13, atol=1e-13)
            assert (out[:, columns:] == -1.0).all()
