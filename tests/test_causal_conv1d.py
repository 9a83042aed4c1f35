"""The convolution's kernels against the reference: values, every gradient, and what a custom op must do."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastm2rec import ops
from fastm2rec.reference.causal_conv1d import causal_conv1d as reference
from tests._bounds import assert_as_good, cast, gradients

NAMES = ("y", "dx", "dweight", "dbias")


class Engine(NamedTuple):
    conv: Callable[..., Tensor]
    forward_op: Any
    backward_op: Any
    device: torch.device


@pytest.fixture(params=["triton", "numba"])
def engine(request: pytest.FixtureRequest, device: torch.device) -> Engine:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    folder = "kernels" if request.param == "triton" else "cpu"
    module = importlib.import_module(f"fastm2rec.{folder}.causal_conv1d")
    place = device if request.param == "triton" else torch.device("cpu")
    return Engine(module.causal_conv1d, module._forward_op, module._backward_op, place)


def _inputs(batch: int, seqlen: int, dim: int, width: int, device: torch.device, bias: bool = True) -> list[Any]:
    x = torch.randn(batch, seqlen, dim, device=device).transpose(1, 2)  # channels side by side, as in the model
    return [x, torch.randn(dim, width, device=device), torch.randn(dim, device=device) if bias else None]


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "width", "bias"),
    [
        (2, 50, 128, 4, True),
        (1, 1, 5, 4, True),
        (3, 7, 66, 3, False),
        (1, 63, 16, 2, True),
        (2, 201, 70, 4, True),
        (1, 1600, 32, 4, True),
    ],
)
def test_values_and_gradients(
    batch: int, seqlen: int, dim: int, width: int, bias: bool, activation: Any, dtype: torch.dtype, engine: Engine
) -> None:
    inputs = cast(_inputs(batch, seqlen, dim, width, engine.device, bias), dtype)
    dy = torch.randn(batch, dim, seqlen, device=engine.device, dtype=dtype)
    got = gradients(partial(engine.conv, activation=activation), inputs, dy)
    plain = gradients(partial(reference, activation=activation), inputs, dy)
    exact = gradients(partial(reference, activation=activation), cast(inputs, torch.float64), dy)
    for name, value, like, right in zip(NAMES, got, plain, exact, strict=False):
        assert_as_good(value, like, right, name=name)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(activation: Any, engine: Engine) -> None:
    if engine.device.type == "cuda":
        pytest.skip("float64 runs in the interpreter only")
    x, weight, bias = (tensor.double().requires_grad_() for tensor in _inputs(1, 4, 2, 3, engine.device))
    assert torch.autograd.gradcheck(partial(engine.conv, activation=activation), (x, weight, bias))


def test_any_strides_and_rows_that_do_not_depend_on_their_batch(engine: Engine) -> None:
    x, weight, bias = _inputs(3, 40, 20, 4, engine.device)
    expected = engine.conv(x, weight, bias, "silu")
    assert torch.equal(engine.conv(x.contiguous(), weight, bias, "silu"), expected)
    every_second = torch.randn(6, 40, 80, device=engine.device)
    every_second[::2, :, ::4] = x.transpose(1, 2)
    view = every_second[::2, :, ::4].transpose(1, 2)
    assert torch.equal(engine.conv(view, weight.t().contiguous().t(), bias, "silu"), expected)
    for row in range(3):
        assert torch.equal(engine.conv(x[row : row + 1], weight, bias, "silu")[0], expected[row])


def test_two_runs_are_bit_equal(engine: Engine) -> None:
    inputs = _inputs(3, 70, 33, 4, engine.device)
    dy = torch.randn(3, 33, 70, device=engine.device)
    first, second = (gradients(partial(engine.conv, activation="silu"), inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck(engine: Engine) -> None:
    x, weight, bias = (tensor.requires_grad_() for tensor in _inputs(2, 9, 6, 4, engine.device))
    torch.library.opcheck(engine.forward_op, (x, weight, bias, True))
    torch.library.opcheck(engine.forward_op, (x, weight, None, False))
    plain = [tensor.detach() for tensor in (x, weight, bias)]
    torch.library.opcheck(
        engine.backward_op, (torch.randn(2, 9, 6, device=engine.device).transpose(1, 2), *plain, True)
    )


def test_compile_and_export(engine: Engine) -> None:
    inputs = _inputs(2, 9, 6, 4, engine.device)
    dy = torch.randn(2, 6, 9, device=engine.device)
    compiled = torch.compile(partial(engine.conv, activation="silu"), fullgraph=True, backend="aot_eager")
    for a, b in zip(
        gradients(compiled, inputs, dy), gradients(partial(engine.conv, activation="silu"), inputs, dy), strict=True
    ):
        assert torch.equal(a, b)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return engine.conv(x, weight, bias, "silu")

    program = torch.export.export(Module(), tuple(inputs), strict=False)
    x, weight, bias = inputs
    assert torch.equal(program.module()(x, weight, bias), engine.conv(x, weight, bias, "silu"))


@pytest.mark.gpu
def test_on_a_gpu(device: torch.device) -> None:
    _check_first_and_last_row(64, 1024, 128, device)


@pytest.mark.gpu
@pytest.mark.usefixtures("large_tensors")
def test_offsets_beyond_32_bits_on_a_gpu(device: torch.device) -> None:
    _check_first_and_last_row(2049, 1024, 1025, device)


def _check_first_and_last_row(batch: int, seqlen: int, dim: int, device: torch.device) -> None:
    x = torch.randn(batch, seqlen, dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
    weight, bias = torch.randn(dim, 4, device=device), torch.randn(dim, device=device)
    y = ops.causal_conv1d(x, weight, bias, "silu", impl="triton")
    for row in (0, batch - 1):
        one = x[row : row + 1]
        exact = reference(one.double(), weight.double(), bias.double(), "silu")
        assert_as_good(y[row : row + 1], reference(one, weight, bias, "silu"), exact)
