"""The closed form of the last position: kernels against the reference, and the fit behind the nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastm2rec.kernels._nodes import accepted, fit_nodes
from tests._bounds import BAND, SLACK, assert_as_good, assert_same, cast, gradients

pytest.importorskip("triton")

from fastm2rec import ops
from fastm2rec.kernels import last_state as kernel
from fastm2rec.kernels.last_state import _backward_op, _forward_op
from fastm2rec.reference import last_state as specification

# Called with lists of arguments, which no type checker follows.
last_state: Any = kernel.last_state
reference: Any = specification.last_state
NAMES = ("y", "du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias")
FORMS = {"gated": ("D", "z", "bias"), "bare": ()}


def _rates(dim: int, dstate: int, spread: float = 0.2) -> Tensor:
    """A as it starts, and as it drifts in training."""
    return -torch.arange(1.0, dstate + 1) * torch.exp(spread * torch.randn(dim, dstate))


def _inputs(batch: int, dim: int, seqlen: int, dstate: int, form: str = "gated") -> list[Any]:
    """u to delta_bias, as the model makes them: channels side by side, B a part of a wider tensor."""
    has = FORMS[form]
    return [
        torch.randn(batch, seqlen, dim).transpose(1, 2),
        torch.randn(batch, seqlen, dim).transpose(1, 2),
        _rates(dim, dstate),
        torch.randn(batch, seqlen, 4 + dstate)[..., 4:].transpose(1, 2),
        torch.randn(batch, dstate),
        torch.randn(dim) if "D" in has else None,
        torch.randn(batch, dim) if "z" in has else None,
        torch.randn(dim) - 3 if "bias" in has else None,
    ]


def _on(inputs: list[Any], device: torch.device) -> list[Any]:
    return [x if x is None else x.to(device) for x in inputs]


def _lengths(batch: int, seqlen: int, device: torch.device) -> Tensor:
    """The whole row, one position, and something between."""
    return torch.tensor([seqlen, 1, -(-2 * seqlen // 3), seqlen][:batch], device=device)


def _function(op: Callable[..., Tensor], lengths: Tensor | None, **how: Any) -> Callable[..., Tensor]:
    return lambda *args: op(*args, True, lengths, **how)


def _compare(names: Sequence[str], got: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    for name, a, b, c in zip(names, got, plain, exact, strict=True):
        assert_as_good(a, b, c, name=name)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "dim", "seqlen", "dstate", "form", "ragged"),
    [
        (2, 128, 50, 16, "gated", True),
        (1, 5, 1, 3, "gated", False),
        (2, 33, 7, 5, "bare", True),
        (2, 24, 63, 32, "gated", True),
        (1, 40, 9, 64, "gated", False),
        (1, 16, 200, 16, "gated", False),
        (2, 16, 201, 16, "gated", True),
    ],
)
def test_values_and_gradients(
    batch: int, dim: int, seqlen: int, dstate: int, form: str, ragged: bool, dtype: torch.dtype, device: torch.device
) -> None:
    inputs: list[Any] = cast(_on(_inputs(batch, dim, seqlen, dstate, form), device), dtype)
    lengths = _lengths(batch, seqlen, device) if ragged else None
    dy = torch.randn(batch, dim, device=device, dtype=dtype)
    got = gradients(_function(last_state, lengths), inputs, dy)
    plain = gradients(_function(reference, lengths), inputs, dy)
    exact = gradients(_function(reference, lengths), cast(inputs, torch.float64), dy)
    _compare(NAMES if form == "gated" else NAMES[:6], got, plain, exact)


def test_steps_without_softplus(device: torch.device) -> None:
    inputs = _on(_inputs(2, 20, 11, 4), device)
    inputs[1], inputs[7] = inputs[1].abs() / 5, None
    dy = torch.randn(2, 20, device=device)
    got, plain = (gradients(op, inputs, dy) for op in (last_state, reference))
    exact = gradients(reference, cast(inputs, torch.float64), dy)
    _compare(NAMES[:8], got, plain, exact)


def test_the_last_positions_do_not_lose_their_steps(device: torch.device) -> None:
    """In the backward pass T there is the difference of two large sums: here with small steps and large rates."""
    inputs = _on(_inputs(2, 16, 60, 4, "bare"), device)
    inputs[1] = torch.full_like(inputs[1], 50.0)
    inputs[1][..., 50:] = 1e-4
    inputs[2] = inputs[2] * 1000
    dy = torch.randn(2, 16, device=device)
    got, plain = (gradients(op, inputs, dy) for op in (last_state, reference))
    exact = gradients(reference, cast(inputs, torch.float64), dy)
    _compare(NAMES[:6], got, plain, exact)


def test_gradcheck(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("float64 runs in the interpreter only")
    inputs: list[Any] = cast(_inputs(1, 2, 3, 2), torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(_function(last_state, torch.tensor([2])), leaves)


def test_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    inputs, dy = _on(_inputs(5, 16, 6, 3), device), torch.randn(5, 16, device=device)
    whole = gradients(_function(last_state, None), inputs, dy)
    monkeypatch.setattr("fastm2rec.kernels._last_state_backward.PROGRAMS", 2)
    few = gradients(_function(last_state, None), inputs, dy)
    for name, a, b in zip(NAMES, few, whole, strict=True):
        # Sums over rows are made in another order; everything else is the same.
        if name in ("dA", "dD", "ddelta_bias"):
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b), name


def test_any_strides_and_rows_that_do_not_depend_on_their_batch(device: torch.device) -> None:
    inputs = _on(_inputs(3, 20, 12, 5), device)
    lengths = _lengths(3, 12, device)
    dy = torch.randn(3, 20, device=device)
    got = gradients(_function(last_state, lengths), inputs, dy)
    wide = [None if x is None else torch.stack([x, x], -1).flip(-1)[..., 0] for x in inputs]
    assert not any(x.is_contiguous() for x in wide if x is not None)
    for a, b in zip(
        gradients(_function(last_state, lengths), wide, torch.stack([dy, dy], -1)[..., 0]), got, strict=True
    ):
        assert_same(a, b)
    contiguous = [None if x is None else x.contiguous() for x in inputs]
    for a, b in zip(gradients(_function(last_state, lengths), contiguous, dy), got, strict=True):
        assert_same(a, b)
    for row in range(3):
        rows = [x if i in (2, 5, 7) else x[row : row + 1] for i, x in enumerate(inputs)]
        one = gradients(_function(last_state, lengths[row : row + 1]), rows, dy[row : row + 1])
        for name, a, b in zip(NAMES, one, got, strict=True):
            if name not in ("dA", "dD", "ddelta_bias"):
                assert torch.equal(a[0], b[row]), name


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    inputs, dy = _on(_inputs(2, 70, 17, 16), device), torch.randn(2, 70, device=device)
    first, second = (gradients(_function(last_state, None), inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_padding_is_not_read(device: torch.device) -> None:
    inputs = _on(_inputs(2, 16, 20, 3), device)
    nodes = fit_nodes(inputs[2])
    lengths, dy = torch.tensor([9, 20], device=device), torch.randn(2, 16, device=device)
    before = gradients(_function(last_state, lengths), inputs, dy)
    approximate = last_state(*inputs, True, lengths, "nodes", nodes, 2)
    for x in (inputs[0], inputs[1], inputs[3]):
        x[0, :, 9:] = torch.nan
    for a, b in zip(gradients(_function(last_state, lengths), inputs, dy), before, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(last_state(*inputs, True, lengths, "nodes", nodes, 2), approximate)


def test_lengths_that_nobody_checked_are_kept_within_the_row(device: torch.device) -> None:
    inputs, dy = _on(_inputs(4, 16, 5, 3), device), torch.randn(4, 16, device=device)
    wrong, kept = (torch.tensor(lengths, device=device) for lengths in ([-7, 99, 2**40 + 2, -(2**40)], [1, 5, 5, 1]))
    got, expected = (gradients(_function(last_state, lengths), inputs, dy) for lengths in (wrong, kept))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    how = {"exponentials": "nodes", "nodes": fit_nodes(inputs[2]), "splits": 2}
    assert torch.equal(last_state(*inputs, True, wrong, **how), last_state(*inputs, True, kept, **how))


def test_an_empty_batch(device: torch.device) -> None:
    inputs = _on(_inputs(0, 16, 5, 3), device)
    got = gradients(_function(last_state, None), inputs, torch.empty(0, 16, device=device))
    for a, b in zip(got, gradients(_function(reference, None), inputs, got[0]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize(("splits", "dtype"), [(2, torch.float32), (3, torch.bfloat16), (9, torch.float32)])
def test_splits(splits: int, dtype: torch.dtype, device: torch.device) -> None:
    """One row has fewer positions than there are splits, and 9 does not divide any."""
    inputs: list[Any] = cast(_on(_inputs(3, 40, 25, 16), device), dtype)
    lengths, dy = _lengths(3, 25, device), torch.randn(3, 40, device=device)
    got = gradients(_function(last_state, lengths, splits=splits), inputs, dy)
    plain = gradients(_function(reference, lengths), inputs, dy)
    exact = gradients(_function(reference, lengths), cast(inputs, torch.float64), dy)
    _compare(NAMES, got, plain, exact)
    row = [x if i in (2, 5, 7) else x[1:2] for i, x in enumerate(inputs)]
    assert torch.equal(last_state(*row, True, lengths[1:2], splits=splits)[0], got[0][1])


def _absolute_sum(inputs: list[Any], lengths: Tensor) -> Tensor:
    """(sum_t |delta u| sum_n |C B|) |silu(z)|: what an error of one exponential is multiplied with, at most."""
    doubles: list[Any] = cast(inputs, torch.float64)
    u, delta, _, B, C, _, z, bias = doubles
    steps = torch.nn.functional.softplus(delta + bias[:, None])
    steps = steps.masked_fill((torch.arange(u.shape[2], device=u.device) >= lengths[:, None])[:, None], 0.0)
    total = (steps * u.abs() * (C[:, :, None] * B).abs().sum(1)[:, None]).sum(2)
    return total * torch.nn.functional.silu(z).abs()


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "seqlen", "dstate", "splits"),
    [(128, 50, 16, 1), (33, 7, 5, 1), (40, 201, 32, 1), (16, 20, 64, 1), (24, 63, 16, 3), (16, 1, 4, 2)],
)
def test_nodes_are_as_wrong_as_their_fit_says(
    dim: int, seqlen: int, dstate: int, splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    inputs: list[Any] = _on(_inputs(2, dim, seqlen, dstate), device)
    if dstate == 64:  # drifted, they span more than nodes reach
        inputs[2] = _rates(dim, dstate, spread=0.0).to(device)
    inputs[:] = cast(inputs, dtype)
    lengths = _lengths(2, seqlen, device)
    nodes = fit_nodes(inputs[2])
    assert nodes.fits
    got = last_state(*inputs, True, lengths, "nodes", nodes, splits)
    plain = reference(*inputs, True, lengths)
    exact = reference(*cast(inputs, torch.float64), True, lengths)
    # Half inputs enter the dot as float16, which rounds each by 2^-12.
    error = nodes.error + (2.0**-12 if dtype == torch.bfloat16 else 0.0)
    allowed = error * _absolute_sum(inputs, lengths) + BAND * torch.finfo(dtype).eps * exact.abs().max()
    excess = ((got.double() - exact).abs() - allowed).max()
    assert excess <= SLACK * (plain.double() - exact).abs().max()


def test_nodes_have_the_exact_functions_gradients(device: torch.device) -> None:
    inputs, dy = _on(_inputs(2, 32, 20, 16), device), torch.randn(2, 32, device=device)
    nodes = fit_nodes(inputs[2])
    got = gradients(_function(last_state, None, exponentials="nodes", nodes=nodes), inputs, dy)
    plain = gradients(_function(reference, None), inputs, dy)
    exact = gradients(_function(reference, None), cast(inputs, torch.float64), dy)
    for i, name in enumerate(NAMES[1:], start=1):
        if name != "dz":  # made of the value before the gate, which is approximate
            assert_as_good(got[i], plain[i], exact[i], name=name)


def test_nodes_do_not_depend_on_the_batch_or_the_run(device: torch.device) -> None:
    inputs = _on(_inputs(3, 40, 30, 16), device)
    nodes, lengths = fit_nodes(inputs[2]), _lengths(3, 30, device)
    got = last_state(*inputs, True, lengths, "nodes", nodes)
    assert torch.equal(last_state(*inputs, True, lengths, "nodes", nodes), got)
    for row in range(3):
        rows = [x if i in (2, 5, 7) else x[row : row + 1] for i, x in enumerate(inputs)]
        assert torch.equal(last_state(*rows, True, lengths[row : row + 1], "nodes", nodes)[0], got[row])


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e30])
def test_nodes_at_the_ends_of_the_range(size: float, device: torch.device) -> None:
    """Each row of C B is scaled for float16: no size of it may overflow, and none but the smallest may vanish."""
    inputs = _on(_inputs(2, 16, 9, 4, "bare"), device)
    inputs[3] = torch.full_like(inputs[3], size)
    nodes = fit_nodes(inputs[2])
    y = last_state(*inputs, True, None, "nodes", nodes)
    exact = reference(*cast(inputs, torch.float64), True)
    assert y.isfinite().all()
    # |y| is at most 9 steps of u and C times size; what vanishes is below that at 1e-30.
    assert (y.double() - exact).abs().max() <= 1e-3 * size * 9 * 50 + (1e-27 if size < 1e-30 else 0.0)


@pytest.mark.parametrize(("dstate", "most"), [(1, 6), (4, 10), (16, 10), (32, 12), (64, 14)])
def test_the_fit_says_how_wrong_it_is(dstate: int, most: int) -> None:
    """At times at which it was not fitted; and it takes few nodes."""
    A = _rates(8, dstate, spread=0.0) * torch.logspace(-3, 3, 8)[:, None]  # the scale of a channel does not matter
    nodes = fit_nodes(A)
    assert nodes.fits
    assert len(nodes.coefficients) <= most
    T = torch.rand(20_000, dtype=torch.float64).pow(6) * 50 / A.double().abs().amin(1)[:, None]  # [E, times]
    alpha = nodes.rates.double()[:, None] * 2.0 ** (torch.arange(len(nodes.coefficients)) / 2)  # [E, K]
    approximate = torch.einsum("qne,eqt->ent", nodes.coefficients.double(), torch.exp(-alpha[..., None] * T[:, None]))
    error = (approximate - torch.exp(A.double()[..., None] * T[:, None])).abs().max()
    # Both are maxima over samples of the same smooth function.
    assert 0.5 * nodes.error < error < 1.1 * nodes.error


def test_a_fit_that_is_not_good_enough(device: torch.device) -> None:
    inputs = _on(_inputs(2, 16, 9, 4), device)
    exact = last_state(*inputs, True)
    inputs[2][3, 0] = -1e5  # far beyond what 16 nodes span
    assert inputs[2].device == device
    too_wide = fit_nodes(inputs[2])
    assert not too_wide.fits
    public: Any = ops.last_state
    for function in (last_state, public):
        with pytest.raises(
            ValueError, match=r"^nodes: expected a fit with an error of at most 1.0e-04, got .*e-0\d with"
        ):
            function(*inputs, True, exponentials="nodes", nodes=too_wide)
        with pytest.raises(ValueError, match=r"^nodes: expected fit_nodes\(A\) with exponentials='nodes', got None"):
            function(*inputs, True, exponentials="nodes")
    fallback = last_state(*inputs, True, exponentials="auto", nodes=too_wide)
    assert torch.equal(fallback, last_state(*inputs, True))
    assert not torch.equal(fallback, exact)
    for growing in (0.0, 0.5, -torch.inf, torch.nan):
        inputs[2][3, 0] = growing
        assert fit_nodes(inputs[2]).error == torch.inf


def test_auto_takes_nodes_that_fit(device: torch.device) -> None:
    inputs = _on(_inputs(2, 16, 9, 4), device)
    nodes = fit_nodes(inputs[2])
    assert accepted("auto", nodes) is nodes
    assert accepted("auto", None) is None
    assert accepted("exact", nodes) is None
    by_name = last_state(*inputs, True, exponentials="nodes", nodes=nodes)
    assert torch.equal(last_state(*inputs, True, exponentials="auto", nodes=nodes), by_name)
    assert not torch.equal(by_name, last_state(*inputs, True))
    assert fit_nodes(inputs[2], tolerance=nodes.error / 2).error < nodes.error


def test_more_states_than_there_are_registers_for(device: torch.device) -> None:
    with pytest.raises(ValueError, match="^A: expected at most 64 states in these kernels, got 65"):
        last_state(*_on(_inputs(1, 16, 3, 65), device), True)


def test_opcheck(device: torch.device) -> None:
    u, delta, A, B, C, D, z, bias = _on(_inputs(1, 16, 3, 3), device)
    nodes, lengths = fit_nodes(A), torch.tensor([2], device=device)
    y, saved = _forward_op(u, delta, A, B, C, D, z, bias, True, lengths, None, None, 1)
    torch.library.opcheck(_backward_op, (y, u, delta, A, B, C, D, z, bias, True, lengths, saved))
    torch.library.opcheck(_backward_op, (y, u, delta, A, B, C, None, None, None, False, None, saved))
    leaves = [x.requires_grad_() for x in (u, delta, A, B, C, D, z, bias)]
    torch.library.opcheck(_forward_op, (*leaves, True, lengths, None, None, 2))
    torch.library.opcheck(_forward_op, (*leaves[:5], None, None, None, False, None, nodes.rates, nodes.coefficients, 1))


@pytest.mark.parametrize("exponentials", ["exact", "nodes"])
def test_compile_and_export(exponentials: str, device: torch.device) -> None:
    inputs = _on(_inputs(2, 16, 6, 3), device)
    nodes, dy = fit_nodes(inputs[2]), torch.randn(2, 16, device=device)
    lengths = torch.tensor([6, 3], device=device)
    eager = _function(last_state, lengths, exponentials=exponentials, nodes=nodes)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, inputs, dy), gradients(eager, inputs, dy), strict=True):
        assert torch.equal(a, b)

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return eager(*inputs)

    program = torch.export.export(Module(), tuple(inputs), strict=False)
    assert torch.equal(program.module()(*inputs), eager(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "dim", "seqlen", "dstate", "splits"),
    [(64, 128, 1024, 16, 1), (64, 128, 200, 32, 1), (1, 128, 1024, 16, 8), (1500, 128, 50, 16, 1), (16, 80, 63, 64, 1)],
)
def test_on_a_gpu(
    batch: int, dim: int, seqlen: int, dstate: int, splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    drawn = _inputs(batch, dim, seqlen, dstate)
    if dstate > 32:
        drawn[2] = _rates(dim, dstate, spread=0.0)  # so many that drifted are not fitted well enough
    inputs: list[Any] = cast(_on(drawn, device), dtype)
    lengths = torch.randint(1, seqlen + 1, (batch,), device=device)
    dy = torch.randn(batch, dim, device=device, dtype=dtype)
    got = gradients(_function(last_state, lengths, splits=splits), inputs, dy)
    plain = gradients(_function(reference, lengths), inputs, dy)
    exact = gradients(_function(reference, lengths), cast(inputs, torch.float64), dy)
    _compare(NAMES, got, plain, exact)
    again = gradients(_function(last_state, lengths, splits=splits), inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    nodes = fit_nodes(inputs[2])
    y = last_state(*inputs, True, lengths, "nodes", nodes, splits)
    error = nodes.error + (2.0**-12 if dtype == torch.bfloat16 else 0.0)
    allowed = error * _absolute_sum(inputs, lengths) + BAND * torch.finfo(dtype).eps * exact[0].abs().max()
    assert ((y.double() - exact[0]).abs() - allowed).max() <= SLACK * (plain[0].double() - exact[0]).abs().max()


@pytest.mark.gpu
@pytest.mark.usefixtures("large_tensors")
def test_offsets_beyond_int32_on_a_gpu(device: torch.device) -> None:
    """u, its gradient and B's partial sums have more than 2^31 elements; the last rows are checked."""
    batch, dim, seqlen, dstate = 2100, 1024, 1024, 4
    u = torch.randn(batch, seqlen, dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
    delta = torch.randn(1, seqlen, dim, device=device, dtype=torch.bfloat16).transpose(1, 2).expand(batch, -1, -1)
    A = _rates(dim, dstate).to(device)
    B = torch.randn(batch, seqlen, dstate, device=device, dtype=torch.bfloat16).transpose(1, 2)
    C, dy = (torch.randn(batch, n, device=device, dtype=torch.bfloat16) for n in (dstate, dim))
    _, saved = _forward_op(u, delta, A, B, C, None, None, None, True, None, None, None, 1)
    du, _, _, dB, dC, *_ = _backward_op(dy, u, delta, A, B, C, None, None, None, True, None, saved)
    for row in (0, batch - 1):
        one = slice(row, row + 1)
        inputs = [u[one], delta[one], A, B[one], C[one], None, None, None]
        plain = gradients(_function(reference, None), inputs, dy[one])
        exact = gradients(_function(reference, None), cast(inputs, torch.float64), dy[one])
        found = [du[one].transpose(1, 2), dB[one].transpose(1, 2), dC[one]]
        _compare(("du", "dB", "dC"), found, [plain[i] for i in (1, 4, 5)], [exact[i] for i in (1, 4, 5)])
