"""The scan kernels against the reference: values, every gradient, packed sequences, and what custom ops must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests._bounds import assert_as_good
from tests._scans import gradients_of_outputs, in_dtype, results, scan_arguments

pytest.importorskip("triton")

from fastm2rec.kernels import selective_scan as kernel
from fastm2rec.reference import selective_scan as specification

# Any: they return one tensor or two.
selective_scan: Any = kernel.selective_scan
reference: Any = specification.selective_scan

PACKED = [0, 1, 8, 41, 73]
BARE = ("D", "z", "delta_bias", "delta_softplus", "initial_state")


# More than one chunk of 32 positions, whole and broken groups of positions, blocks of channels and powers of two.
@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "dstate", "without", "cu_seqlens"),
    [
        (2, 50, 40, 16, (), None),
        (1, 1, 5, 1, ("initial_state",), None),
        (3, 7, 33, 3, BARE, None),
        (1, 63, 32, 20, ("z",), None),
        (1, 201, 32, 16, ("D", "initial_state"), None),
        (1, 73, 33, 6, (), PACKED),
        (1, 73, 7, 4, BARE, PACKED),
    ],
)
def test_values_and_gradients(
    batch: int,
    seqlen: int,
    dim: int,
    dstate: int,
    without: tuple[str, ...],
    cu_seqlens: list[int] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    arguments = scan_arguments(batch, seqlen, dim, dstate, device, dtype, without, cu_seqlens)
    dy, dlast = gradients_of_outputs(arguments)
    got = results(selective_scan, arguments, dy, dlast)
    plain = results(reference, arguments, dy, dlast)
    exact = results(reference, in_dtype(arguments, torch.float64), dy, dlast)
    for name, value in got.items():
        assert_as_good(value, plain[name], exact[name], name=name)


def test_without_gradients_nothing_changes(device: torch.device) -> None:
    arguments = scan_arguments(1, 37, 6, 4, device)
    y = selective_scan(**arguments)
    assert torch.equal(y, results(selective_scan, arguments, *gradients_of_outputs(arguments))["y"])


@pytest.mark.parametrize("output", ["y", "last_state"])
def test_gradients_through_one_output_alone(output: str, device: torch.device) -> None:
    arguments = scan_arguments(1, 9, 4, 4, device)
    grads = []
    for op in (selective_scan, reference):
        u = arguments["u"].detach().requires_grad_()
        y, last_state = op(**{**arguments, "u": u}, return_last_state=True)
        grads.append(torch.autograd.grad({"y": y, "last_state": last_state}[output].square().sum(), u)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 2, 5]])
def test_gradcheck(cu_seqlens: list[int] | None, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("float64 runs in the interpreter only")
    arguments = in_dtype(scan_arguments(1, 5, 2, 2, device, cu_seqlens=cu_seqlens), torch.float64)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**{**arguments, **dict(zip(names, leaves, strict=True))}, return_last_state=True)

    leaves = [arguments[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_a_row_does_not_depend_on_its_batch_and_two_runs_are_equal(device: torch.device) -> None:
    arguments = scan_arguments(3, 35, 36, 5, device)
    dy, dlast = gradients_of_outputs(arguments)
    first, again = (results(selective_scan, arguments, dy, dlast) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    shared = {"A", "D", "delta_bias"}
    row = {
        name: value[1:2] if isinstance(value, Tensor) and name not in shared else value
        for name, value in arguments.items()
    }
    alone = results(selective_scan, row, dy[1:2], dlast[1:2])
    for name in first.keys() - shared:
        assert torch.equal(alone[name][0], first[name][1]), name


def test_a_packed_sequence_is_the_sequence_alone(device: torch.device) -> None:
    arguments = scan_arguments(1, 73, 34, 5, device, cu_seqlens=PACKED)
    dy, dlast = gradients_of_outputs(arguments)
    packed = results(selective_scan, arguments, dy, dlast)
    for cu_seqlens in (arguments["cu_seqlens"].int(), arguments["cu_seqlens"].repeat_interleave(2)[::2]):
        assert torch.equal(selective_scan(**{**arguments, "cu_seqlens": cu_seqlens}), packed["y"])
    over_time, per_sequence = {"u", "delta", "B", "C", "z", "y"}, {"initial_state", "last_state"}
    s, start, end = 2, PACKED[2], PACKED[3]
    single = {
        name: value[..., start:end] if name in over_time else value[s : s + 1] if name in per_sequence else value
        for name, value in arguments.items()
    }
    alone = results(selective_scan, {**single, "cu_seqlens": None}, dy[..., start:end], dlast[s : s + 1])
    for name in over_time:
        assert torch.equal(alone[name], packed[name][..., start:end]), name
    for name in per_sequence:
        assert torch.equal(alone[name][0], packed[name][s]), name


def test_any_strides(device: torch.device) -> None:
    arguments = scan_arguments(2, 34, 6, 5, device)
    dy, dlast = gradients_of_outputs(arguments)
    expected = results(selective_scan, arguments, dy, dlast)

    def spread(value: Any) -> Any:
        """The same values at every second place of every axis, the last axis outermost."""
        if not isinstance(value, Tensor):
            return value
        wide = torch.full([2 * size for size in reversed(value.shape)], torch.nan, device=device)
        view = wide[(slice(None, None, 2),) * value.dim()].permute(*reversed(range(value.dim())))
        return view.copy_(value)

    got = results(selective_scan, {name: spread(value) for name, value in arguments.items()}, spread(dy), spread(dlast))
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.usefixtures("overlapping_writes")
def test_sequence_limits_never_lead_outside(device: torch.device) -> None:
    """Their values are not checked on a GPU. What lies outside is ignored, what remains is computed."""
    arguments = scan_arguments(1, 40, 4, 4, device, without=("initial_state",), cu_seqlens=[0, 30, 40])
    expected = selective_scan(**arguments)
    wrong = torch.tensor([-5, 30, 1 << 30, 35, 1 << 40], device=device)
    assert torch.equal(selective_scan(**{**arguments, "cu_seqlens": wrong})[..., :30], expected[..., :30])
    grads = results(selective_scan, {**arguments, "cu_seqlens": wrong}, torch.ones_like(expected), torch.zeros(4, 4, 4))
    assert grads["u"][..., :35].isfinite().all()


def test_too_many_states(device: torch.device) -> None:
    with pytest.raises(
        ValueError, match=f"^A: expected a d_state .* of at most {kernel.MAX_DSTATE}, got {kernel.MAX_DSTATE + 1}"
    ):
        selective_scan(**scan_arguments(1, 2, 2, kernel.MAX_DSTATE + 1, device))
    arguments = scan_arguments(1, 3, 2, kernel.MAX_DSTATE, device)
    torch.testing.assert_close(selective_scan(**arguments), reference(**arguments))


@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 5]])
def test_opcheck(cu_seqlens: list[int] | None, device: torch.device) -> None:
    arguments = scan_arguments(1, 5, 4, 4, device, cu_seqlens=cu_seqlens)
    leaves = [
        value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in arguments.values()
    ]
    torch.library.opcheck(torch.ops.fastm2rec.selective_scan.default, (*leaves, True, True))
    inputs = [value.detach() if isinstance(value, Tensor) else value for value in leaves]
    dy, dlast = gradients_of_outputs(arguments)
    y, last_state, checkpoints = torch.ops.fastm2rec.selective_scan(*inputs, True, True)
    assert (y.shape, last_state.shape) == (dy.shape, dlast.shape)
    torch.library.opcheck(torch.ops.fastm2rec.selective_scan_backward.default, (*inputs, checkpoints, dy, dlast))


def test_compiles_whole(device: torch.device) -> None:
    arguments = scan_arguments(2, 6, 4, 4, device)
    dy, dlast = gradients_of_outputs(arguments)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    expected, got = results(selective_scan, arguments, dy, dlast), results(compiled, arguments, dy, dlast)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_exports(device: torch.device) -> None:
    class Scan(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return selective_scan(u, delta, A, B, C, delta_softplus=True)

    inputs = tuple(scan_arguments(2, 6, 4, 4, device)[name] for name in ("u", "delta", "A", "B", "C"))
    program = torch.export.export(Scan(), inputs, strict=False)
    assert torch.equal(program.module()(*inputs), Scan()(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "dstate"), [(64, 200, 128, 16), (8, 1024, 128, 32), (3, 201, 96, 64)]
)
def test_on_a_device(batch: int, seqlen: int, dim: int, dstate: int, dtype: torch.dtype, device: torch.device) -> None:
    arguments = scan_arguments(batch, seqlen, dim, dstate, device, dtype)
    dy, dlast = gradients_of_outputs(arguments)
    got, again = (results(selective_scan, arguments, dy, dlast) for _ in range(2))
    plain = results(reference, arguments, dy, dlast)
    exact = results(reference, in_dtype(arguments, torch.float64), dy, dlast)
    for name, value in got.items():
        # The special-function unit's exp2 has an error of 2 units in the last place, PyTorch's exp of 1; it enters at
        # every position.
        assert_as_good(value, plain[name], exact[name], slack=4.0, name=name)
        assert torch.equal(value, again[name]), name


@pytest.mark.gpu
@pytest.mark.usefixtures("large_tensors")
def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """The last row of tensors with more than 2^31 elements (4 GB each in bfloat16) equals the row alone."""
    seqlen, dim, dstate = 1024, 1024, 4
    batch = 2**31 // (seqlen * dim) + 1
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free device memory")
    u = torch.randn(1, seqlen, dim, device=device, dtype=torch.bfloat16).expand(batch, -1, -1).contiguous()
    delta = torch.rand_like(u)
    A = -torch.rand(dim, dstate, device=device)
    B, C = (torch.randn(batch, dstate, seqlen, device=device, dtype=torch.bfloat16) for _ in range(2))
    y = selective_scan(u.transpose(1, 2), delta.transpose(1, 2), A, B, C)
    alone = selective_scan(u[-1:].transpose(1, 2), delta[-1:].transpose(1, 2), A, B[-1:], C[-1:])
    assert torch.equal(y[-1:], alone)
