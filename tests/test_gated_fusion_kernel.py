"""The gated fusion's kernels against the reference: every gate, every gradient, and what a custom op must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests._bounds import assert_as_good, assert_same, cast, gradients

pytest.importorskip("triton")

from fastm2rec.kernels._gather_backward import CHUNK, launch_gather_backward
from fastm2rec.kernels.gated_fusion import _backward_op, _forward_op, gated_fusion
from fastm2rec.reference.gated_fusion import gated_fusion as reference

TENSORS = (
    "h", "text", "ids", "alpha", "beta", "weight", "bias", "gate_weight", "gate_bias", "norm_weight", "norm_bias",
)  # fmt: skip


def _operands(
    batch: int, dim: int, gate: str, device: torch.device, *, n_rows: int | None = None, norm: bool = False
) -> list[Any]:
    """In the order of TENSORS; n_rows makes the text a table with ids."""
    r = torch.randn
    tensors: dict[str, Tensor] = {"h": r(batch, dim), "weight": r(dim, dim) / dim**0.5, "bias": r(dim)}
    if gate != "none":
        tensors["text"] = r(batch if n_rows is None else n_rows, dim)
        if n_rows is not None:
            tensors["ids"] = torch.randint(0, n_rows, (batch,))
    if gate == "context":
        tensors |= {"gate_weight": r(2 * dim, 2 * dim) / dim**0.5, "gate_bias": r(2 * dim)}
    elif gate != "none":
        shape = (dim,) if gate == "vector" else ()
        tensors |= {"alpha": r(shape), "beta": r(shape)}
    if norm:
        tensors |= {"norm_weight": r(dim), "norm_bias": r(dim)}
    return [tensors[name].to(device) if name in tensors else None for name in TENSORS]


def _call(function: Any, tensors: Any, residual: bool) -> Tensor:
    h, text, ids, alpha, beta, weight, bias, *rest = tensors
    named = dict(zip(TENSORS[7:], rest, strict=True))
    return function(h, text, alpha, beta, weight, bias, ids=ids, residual=residual, eps=1e-5, **named)


def _gradients(function: Any, tensors: list[Any], dy: Tensor, residual: bool) -> dict[str, Tensor]:
    values = gradients(lambda *args: _call(function, args, residual), tensors, dy)
    leaves = [name for name, x in zip(TENSORS, tensors, strict=True) if x is not None and x.is_floating_point()]
    return dict(zip(["y", *(f"d{name}" for name in leaves)], values, strict=True))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "dim", "gate", "n_rows", "residual", "norm"),
    [
        (33, 64, "scalar", 7, False, False),  # the paper's
        (33, 64, "context", 7, True, True),
        (70, 64, "none", None, True, False),  # the control
        (2, 5, "none", None, False, True),
        (70, 24, "vector", None, False, True),
        (300, 8, "vector", 2, True, False),  # very many equal ids
        (1, 1, "scalar", 1, True, False),
        (3, 16, "context", None, False, False),
        (17, 130, "context", 5, True, True),  # more than one chunk, and more than one tile, of channels
    ],
)
def test_values_and_gradients(
    batch: int,
    dim: int,
    gate: str,
    n_rows: int | None,
    residual: bool,
    norm: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    tensors = cast(_operands(batch, dim, gate, device, n_rows=n_rows, norm=norm), dtype)
    dy = torch.randn(batch, dim, device=device, dtype=dtype)
    got = _gradients(gated_fusion, tensors, dy, residual)
    plain = _gradients(reference, tensors, dy, residual)
    exact = _gradients(reference, cast(tensors, torch.float64), dy, residual)
    for name, value in got.items():
        assert_as_good(value, plain[name], exact[name], name=name)


def test_parameters_may_be_wider_than_activations(device: torch.device) -> None:
    tensors = _operands(9, 12, "context", device, n_rows=4, norm=True)
    tensors[0] = tensors[0].bfloat16()
    dy = torch.randn(9, 12, device=device)
    got = _gradients(gated_fusion, tensors, dy, True)
    exact = _gradients(reference, cast(tensors, torch.float64), dy.bfloat16(), True)
    assert got["y"].dtype == got["dh"].dtype == torch.bfloat16
    for name, value in got.items():
        if name not in ("y", "dh"):
            assert value.dtype == torch.float32
        # The products round their operands to bfloat16, so plain PyTorch in bfloat16 is the measure.
        plain = _gradients(reference, cast(tensors, torch.bfloat16), dy, True)[name]
        assert_as_good(value.bfloat16(), plain, exact[name], name=name)


@pytest.mark.parametrize("gate", ["vector", "context"])
def test_gradcheck(gate: str, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("float64 runs in the interpreter only")
    tensors = cast(_operands(3, 3, gate, device, n_rows=2, norm=True), torch.float64)
    places = [i for i, tensor in enumerate(tensors) if tensor is not None and tensor.is_floating_point()]

    def function(*leaves: Tensor) -> Tensor:
        full = list(tensors)
        for place, leaf in zip(places, leaves, strict=True):
            full[place] = leaf
        return _call(gated_fusion, full, True)

    leaves = [tensors[i].requires_grad_() for i in places]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)  # every entry's turn would take a minute


@pytest.mark.parametrize("gate", ["vector", "context"])
def test_any_strides_and_rows_that_do_not_depend_on_their_batch(gate: str, device: torch.device) -> None:
    tensors = _operands(40, 20, gate, device, n_rows=6, norm=True)
    dy = torch.randn(20, device=device).expand(40, 20)
    expected = _gradients(gated_fusion, tensors, dy, True)
    strided = [None if x is None else x if x.dim() == 0 else _with_gaps(x) for x in tensors]
    for name, value in _gradients(gated_fusion, strided, dy, True).items():
        assert_same(value, expected[name], name)
    for row in (0, 39):
        alone = list(tensors)
        alone[0], alone[2] = tensors[0][row : row + 1], tensors[2][row : row + 1]
        got = _gradients(gated_fusion, alone, dy[row : row + 1], True)
        for name in ("y", "dh"):
            assert torch.equal(got[name][0], expected[name][row])


def _with_gaps(x: Tensor) -> Tensor:
    """The same values with no axis contiguous, the first one innermost."""
    room = torch.full([3 * size for size in reversed(x.shape)], 77, dtype=x.dtype, device=x.device)
    view = room[tuple(slice(None, None, 3) for _ in x.shape)].permute(*reversed(range(x.dim())))
    view.copy_(x)
    return view


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    tensors = _operands(140, 12, "context", device, n_rows=3, norm=True)
    dy = torch.randn(140, 12, device=device)
    first, second = (_gradients(gated_fusion, tensors, dy, True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize(
    "counts",
    [
        [1],
        [CHUNK - 1],
        [CHUNK],
        [0, CHUNK + 1],
        [3 * CHUNK + 5],  # one row, several whole chunks
        [CHUNK, 0, CHUNK],  # chunks that end where rows do
        [5, 2 * CHUNK - 6, 1, 0, 2],  # a row that begins and ends inside chunks
        [70, 100, 30],  # a row over an edge, without a whole chunk
    ],
    ids=str,
)
def test_the_gradient_of_a_gather(counts: list[int], device: torch.device) -> None:
    """Small whole numbers, whose sums are exact in any order."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = ids[torch.randperm(len(ids))].to(device)
    dy = torch.randint(-8, 9, (len(ids), 70), device=device).float()
    table = torch.empty(len(counts) + 2, 70, device=device)
    expected = torch.zeros_like(table).index_add_(0, ids, dy)
    assert torch.equal(launch_gather_backward(dy, ids, table), expected)


def test_ids_outside_the_table_stay_inside_it(device: torch.device) -> None:
    tensors = _operands(4, 6, "vector", device, n_rows=3)
    dy = torch.randn(4, 6, device=device)
    outside, nearest = list(tensors), list(tensors)
    outside[2] = torch.tensor([-1, 3, 2**40, -(2**62)], device=device)
    nearest[2] = torch.tensor([0, 2, 2, 0], device=device)
    got, expected = (_gradients(gated_fusion, x, dy, False) for x in (outside, nearest))
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def test_an_empty_batch_and_a_frozen_table(device: torch.device) -> None:
    for batch in (0, 3):
        tensors = _operands(batch, 6, "context", device, n_rows=3, norm=True)
        dy = torch.randn(batch, 6, device=device)
        expected = _gradients(gated_fusion, tensors, dy, True)
        frozen = [x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in tensors]
        frozen[1] = tensors[1]
        _call(gated_fusion, frozen, True).backward(dy)
        assert tensors[1].grad is None
        for name, leaf in zip(TENSORS, frozen, strict=True):
            if leaf is not None and leaf.requires_grad:
                assert torch.equal(leaf.grad, expected[f"d{name}"]), name
    assert not expected["dtext"].isnan().any()


@pytest.mark.parametrize("gate", ["none", "scalar", "context"])
def test_opcheck(gate: str, device: torch.device) -> None:
    tensors = _operands(5, 6, gate, device, n_rows=3, norm=gate != "scalar")
    leaves = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in tensors]
    torch.library.opcheck(_forward_op, (*leaves, True, 1e-5, True))
    plain = [None if x is None else x.detach() for x in leaves]
    torch.library.opcheck(_forward_op, (*plain, False, 1e-5, False))
    _, *saved = _forward_op(*plain, True, 1e-5, True)
    for needs_text in (False, True):
        torch.library.opcheck(_backward_op, (torch.randn(5, 6, device=device), *plain, *saved, True, needs_text))


@pytest.mark.parametrize("gate", ["scalar", "context"])
def test_compile_and_export(gate: str, device: torch.device) -> None:
    tensors = _operands(5, 6, gate, device, n_rows=3, norm=True)
    dy = torch.randn(5, 6, device=device)
    compiled = torch.compile(
        lambda *args, **named: gated_fusion(*args, **named), fullgraph=True, backend="aot_eager", dynamic=False
    )
    expected = _gradients(gated_fusion, tensors, dy, True)
    for name, value in _gradients(compiled, tensors, dy, True).items():
        assert torch.equal(value, expected[name]), name

    class Module(torch.nn.Module):
        def forward(self, *args: Tensor | None) -> Tensor:
            return _call(gated_fusion, args, True)

    program = torch.export.export(Module(), tuple(tensors), strict=False)
    assert_same(program.module()(*tensors), expected["y"])


def test_rows_wider_than_a_program_holds(device: torch.device) -> None:
    with pytest.raises(ValueError, match="^h: expected at most 4,096 channels for the Triton kernels, got 4,097"):
        _call(gated_fusion, _operands(1, 4097, "none", device, n_rows=1), True)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "scalar", "vector", "context"])
@pytest.mark.parametrize(("batch", "dim"), [(4096, 64), (2048, 256), (131, 1000)])
def test_on_a_gpu(gate: str, batch: int, dim: int, device: torch.device) -> None:
    tensors = cast(_operands(batch, dim, gate, device, n_rows=500, norm=True), torch.bfloat16)
    dy = torch.randn(batch, dim, device=device, dtype=torch.bfloat16)
    got = _gradients(gated_fusion, tensors, dy, True)
    plain = _gradients(reference, tensors, dy, True)
    exact = _gradients(reference, cast(tensors, torch.float64), dy, True)
    for name, value in got.items():
        assert_as_good(value, plain[name], exact[name], name=name)
    for name, value in _gradients(gated_fusion, tensors, dy, True).items():
        assert torch.equal(value, got[name]), name


@pytest.mark.gpu
@pytest.mark.usefixtures("large_tensors")
def test_a_table_past_32_bit_offsets_on_a_gpu(device: torch.device) -> None:
    """More than 2^31 elements; the last row is read, and its gradient written."""
    n_rows, dim = 2**25 + 3, 64
    tensors = cast(_operands(64, dim, "vector", device, n_rows=8), torch.bfloat16)
    table = torch.zeros(n_rows, dim, device=device, dtype=torch.bfloat16)
    small, offset = tensors[1], n_rows - 8
    assert small is not None
    table[offset:] = small
    ids = tensors[2]
    assert ids is not None
    big = [*tensors]
    big[1], big[2] = table, ids + offset
    dy = torch.randn(64, dim, device=device, dtype=torch.bfloat16)
    got, expected = (_gradients(gated_fusion, x, dy, True) for x in (big, tensors))
    assert torch.equal(got.pop("dtext")[offset:], expected.pop("dtext"))
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name
