"""What follows the scan, by the numba engine: the specification where nothing is drawn, and of the same draw."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastm2rec import M2Rec, M2RecConfig
from tests._bounds import assert_as_good, cast, gradients

pytest.importorskip("numba", reason="numba is not installed")

from fastm2rec.cpu import output_ffn as engine
from fastm2rec.cpu.output_ffn import output_ffn
from fastm2rec.reference.output_ffn import output_ffn as reference

EPS = 1e-12
NAMES = (
    "out", "y", "residual", "out_weight", "out_bias", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias",
    "fc2_weight", "fc2_bias", "last_weight", "last_bias",
)  # fmt: skip


def _inputs(batch: int, inner: int = 64, dim: int = 32, hidden: int = 128, *, optional: bool = True) -> list[Any]:
    """In the order of NAMES, from y on."""
    r = torch.randn
    return [
        r(batch, inner), r(batch, dim) if optional else None, r(dim, inner) * inner**-0.5,
        r(dim) if optional else None, 1 + 0.3 * r(dim), r(dim), r(hidden, dim) * dim**-0.5,
        r(hidden) if optional else None, r(dim, hidden) * hidden**-0.5, r(dim) if optional else None,
        1 + 0.3 * r(dim), r(dim),
    ]  # fmt: skip


def _call(function: Any, dropout: float, *values: Any) -> Tensor:
    return function(*values, EPS, dropout)


def _results(function: Any, inputs: list[Any], dout: Tensor, dropout: float = 0.0) -> list[Tensor]:
    """The output and every gradient."""
    return gradients(partial(_call, function, dropout), inputs, dout)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize(
    ("batch", "inner", "dim", "hidden"),
    [(1, 64, 32, 128), (7, 32, 32, 32), (16, 128, 64, 256), (300, 128, 64, 256), (33, 96, 96, 160)],
)
def test_without_dropout_it_is_the_reference(batch: int, inner: int, dim: int, hidden: int, optional: bool) -> None:
    inputs, dout = _inputs(batch, inner, dim, hidden, optional=optional), torch.randn(batch, dim)
    wide: list[Any] = cast(inputs, torch.float64)
    got, plain, exact, double = (
        _results(f, values, dout)
        for f, values in ((output_ffn, inputs), (reference, inputs), (reference, wide), (output_ffn, wide))
    )
    present = [name for name, value in zip(NAMES, [dout, *inputs], strict=True) if value is not None]
    for name, a, b, c, d in zip(present, got, plain, exact, double, strict=True):
        assert_as_good(a, b, c, name=name)
        assert (d - c).abs().max() <= 1e-13 * max(1.0, float(c.abs().max())), name


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = [value.double().requires_grad_() for value in _inputs(3, 32, 32, 32)]
    assert torch.autograd.gradcheck(partial(_call, output_ffn, 0.0), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_far_from_zero(dtype: torch.dtype) -> None:
    """Where it is 0 or the identity, and its slope 0 or 1."""
    inputs = [value.to(dtype) for value in _inputs(8)]
    inputs[7] = torch.linspace(-60, 60, 128, dtype=dtype)
    wide, dout = cast(inputs, torch.float64), torch.randn(8, 32)
    got, plain, exact = (
        _results(f, v, dout) for f, v in ((output_ffn, inputs), (reference, inputs), (reference, wide))
    )
    for name, a, b, c in zip(NAMES, got, plain, exact, strict=True):
        assert_as_good(a, b, c, name=name)


def test_inputs_of_any_strides() -> None:
    inputs, dout = _inputs(21), torch.randn(21, 32)
    loose = [value.t().contiguous().t() if value.dim() == 2 else value.repeat(2)[: len(value)] for value in inputs]
    expected, got = _results(output_ffn, inputs, dout), _results(output_ffn, loose, dout.t().contiguous().t())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    inputs, dout = _inputs(101), torch.randn(101, 32)
    expected = _results(output_ffn, inputs, dout)
    assert all(torch.equal(a, b) for a, b in zip(_results(output_ffn, inputs, dout), expected, strict=True))
    monkeypatch.setattr(engine, "MULTIPLY_ADDS", 1)
    threads(3)
    got = _results(output_ffn, inputs, dout)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for row in (0, 50, 100):
        one = slice(row, row + 1)
        out, dy, dresidual, *_ = _results(output_ffn, [inputs[0][one], inputs[1][one], *inputs[2:]], dout[one])
        for alone, whole in zip((out, dy, dresidual), expected, strict=False):
            assert torch.equal(alone[0], whole[row])


def _factors(batch: int, inputs: list[Any], seed: int, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """0 where the engine drops a number, 1 / (1 - p) elsewhere: [B, D], [B, H] and [B, D].

    Read off the gradients of the three biases in front of which dropout stands: with a gradient of the output in one
    row alone they are 0 where that row drops.
    """
    found: list[list[Tensor]] = [[], [], []]
    for row in range(batch):
        torch.manual_seed(seed)
        dout = torch.zeros(batch, len(inputs[4])).double()
        dout[row] = torch.randn(len(inputs[4]), generator=torch.Generator().manual_seed(row)).double()
        _, _, _, _, dout_bias, _, _, _, dfc1_bias, _, dfc2_bias, *_ = _results(output_ffn, inputs, dout, p)
        for kept, gradient in zip(found, (dout_bias, dfc1_bias, dfc2_bias), strict=True):
            kept.append((gradient != 0).double() / (1 - p))
    first, second, third = (torch.stack(rows) for rows in found)
    return first, second, third


def test_with_dropout_it_is_the_reference_of_the_same_draw() -> None:
    batch, p = 19, 0.3
    inputs = [value.double() for value in _inputs(batch)]
    inputs[7] += 3  # no slope of gelu is 0
    drawn = _factors(batch, inputs, 5, p)

    def same(y: Tensor, residual: Tensor, *rest: Tensor) -> Tensor:
        out_weight, out_bias, norm, norm_bias, fc1, fc1_bias, fc2, fc2_bias, last, last_bias = rest[:10]
        x = F.layer_norm(F.linear(y, out_weight, out_bias) * drawn[0] + residual, norm.shape, norm, norm_bias, EPS)
        hidden = F.gelu(F.linear(x, fc1, fc1_bias)) * drawn[1]
        return F.layer_norm(x + F.linear(hidden, fc2, fc2_bias) * drawn[2], last.shape, last, last_bias, EPS)

    dout = torch.randn(batch, 32).double()
    torch.manual_seed(5)
    got = _results(output_ffn, inputs, dout, p)
    for name, a, b in zip(NAMES, got, gradients(same, inputs, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
    # Five standard deviations, of the three together and of each two: by chance once in two million.
    numbers = torch.cat([mask.flatten() for mask in drawn])
    spread = (p / (1 - p)) ** 0.5
    assert abs(numbers.mean() - 1) <= 5 * spread / len(numbers) ** 0.5
    for first, second in ((0, 1), (0, 2), (1, 2)):
        a, b = (drawn[i][:, :32].flatten() - 1 for i in (first, second))
        assert abs((a * b).mean()) <= 5 * spread**2 / len(a) ** 0.5, "the same draw twice"


def test_draws_come_from_torchs_generator_and_not_from_threads(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    inputs, dout = _inputs(50), torch.randn(50, 32)

    def draw(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return _results(output_ffn, inputs, dout, 0.5)

    first = draw(0)
    assert not torch.equal(draw(1)[0], first[0])
    monkeypatch.setattr(engine, "MULTIPLY_ADDS", 1)
    threads(3)
    again = draw(0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_evaluation_draws_nothing() -> None:
    inputs, dout = _inputs(5), torch.randn(5, 32)
    state = torch.get_rng_state()
    expected = _results(output_ffn, inputs, dout)[0]
    with torch.inference_mode():
        out = _call(output_ffn, 0.0, *inputs)
    assert torch.equal(out, expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("batch", "inner", "dim", "hidden", "dtype"),
    [(3, 48, 32, 64, torch.float32), (3, 64, 20, 80, torch.float32), (3, 64, 32, 64, torch.bfloat16),
     (0, 64, 32, 64, torch.float32)],
)  # fmt: skip
def test_where_the_kernels_cannot_run_it_is_the_reference(
    batch: int, inner: int, dim: int, hidden: int, dtype: torch.dtype
) -> None:
    inputs, dout = [value.to(dtype) for value in _inputs(batch, inner, dim, hidden)], torch.randn(batch, dim)
    for a, b in zip(_results(output_ffn, inputs, dout), _results(reference, inputs, dout), strict=True):
        assert torch.equal(a, b)


def test_autocast_is_the_reference() -> None:
    inputs = _inputs(5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_call(output_ffn, 0.0, *inputs), _call(reference, 0.0, *inputs))


def test_a_gradient_of_the_gradient_is_refused() -> None:
    inputs = [value.requires_grad_() for value in _inputs(3)]
    (dy,) = torch.autograd.grad(_call(output_ffn, 0.0, *inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dy.sum().backward()


def test_a_weight_that_was_changed_before_the_gradient_is_noticed() -> None:
    inputs = [value.requires_grad_() for value in _inputs(3)]
    out = _call(output_ffn, 0.0, *inputs)
    with torch.no_grad():
        inputs[6].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def _shifted(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + torch.linspace(0, 1, output.shape[-1])


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("name", ["mamba.out_proj", "norm", "ffn.fc1", "ffn.fc2", "ffn.norm", "dropout", "ffn"])
def test_a_hook_on_what_the_op_stands_for_counts(name: str, n_layers: int) -> None:
    model = M2Rec(M2RecConfig(n_items=9, max_len=8, d_model=32, gate="none", n_layers=n_layers), impl="cpu").eval()
    ids, lengths = torch.randint(1, 10, (3, 8)), torch.tensor([8, 3, 5])
    hooked = copy.deepcopy(model)
    hooked.impl = "reference"
    plain = model(ids, lengths)
    torch.testing.assert_close(plain, hooked(ids, lengths), rtol=1e-4, atol=1e-5)
    for one in (model, hooked):
        one.encoder.layers[-1].get_submodule(name).register_forward_hook(_shifted)
    got = model(ids, lengths)
    torch.testing.assert_close(got, hooked(ids, lengths), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-3)
