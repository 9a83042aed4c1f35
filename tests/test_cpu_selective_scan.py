"""The engine's scan at all positions against the reference: values, every gradient, packed sequences, threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests._bounds import assert_as_good
from tests._scans import Arguments, gradients_of_outputs, in_dtype, results, scan_arguments

pytest.importorskip("numba", reason="numba is not installed")

from fastm2rec import impl, ops
from fastm2rec.cpu import selective_scan as engine
from fastm2rec.cpu.selective_scan import _backward_op, _forward_op
from fastm2rec.reference import selective_scan as specification
from fastm2rec.reference.mamba import Mamba

# Any: they return one tensor or two.
selective_scan: Any = engine.selective_scan
reference: Any = specification.selective_scan

CPU = torch.device("cpu")
BARE = ("D", "z", "delta_bias", "delta_softplus", "initial_state")
PACKED = [0, 1, 8, 41, 57, 73, 75]
OVER_TIME, PER_SEQUENCE, SHARED = {"u", "delta", "B", "C", "z", "y"}, {"initial_state", "last_state"}, {"A", "D"}


def _case(
    batch: int, seqlen: int, dim: int, dstate: int, dtype: torch.dtype = torch.float32, **rest: Any
) -> tuple[Arguments, Tensor, Tensor]:
    """Arguments, and gradients of y and of the last state."""
    arguments = scan_arguments(batch, seqlen, dim, dstate, CPU, dtype, **rest)
    return arguments, *gradients_of_outputs(arguments)


def _assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the number of threads, for the test; every tile and every group of rows may go to another one."""
    monkeypatch.setattr(engine, "SLICE", 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Whole and broken blocks of positions, tiles of channels and pairs of states; more than one group of sequences.
@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "dstate", "without", "cu_seqlens"),
    [
        (2, 50, 128, 16, (), None),
        (9, 7, 33, 5, BARE, None),
        (4, 1, 5, 1, ("initial_state",), None),
        (2, 63, 64, 33, ("z",), None),
        (1, 200, 40, 16, ("delta_bias", "delta_softplus"), None),
        (1, 201, 32, 16, ("D", "initial_state"), None),
        (1, 75, 33, 6, (), PACKED),
        (1, 75, 7, 3, BARE, PACKED),
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
) -> None:
    arguments, *given = _case(batch, seqlen, dim, dstate, dtype=dtype, without=without, cu_seqlens=cu_seqlens)
    got, plain = results(selective_scan, arguments, *given), results(reference, arguments, *given)
    wide = in_dtype(arguments, torch.float64)
    exact = results(reference, wide, *given)
    for name, value in got.items():
        assert_as_good(value, plain[name], exact[name], name=name)
    if dtype == torch.float32:
        for name, value in results(selective_scan, wide, *given).items():
            assert (value - exact[name]).abs().max() <= 1e-13 * exact[name].abs().max(), name


@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("delta_softplus",), ("initial_state",), BARE])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 2, 5]])
def test_gradcheck(cu_seqlens: list[int] | None, without: tuple[str, ...]) -> None:
    arguments = in_dtype(scan_arguments(1, 5, 2, 3, CPU, without=without, cu_seqlens=cu_seqlens), torch.float64)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**{**arguments, **dict(zip(names, leaves, strict=True))}, return_last_state=True)

    leaves = [arguments[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_it_is_what_runs_on_a_cpu() -> None:
    assert impl.resolve("selective_scan", "auto", "cpu") is engine.selective_scan
    arguments, *_ = _case(2, 9, 6, 4)
    assert torch.equal(ops.selective_scan(**arguments), selective_scan(**arguments))  # type: ignore[arg-type]


def test_without_gradients_nothing_changes() -> None:
    arguments, *given = _case(1, 37, 6, 4)
    y = selective_scan(**arguments)
    assert torch.equal(y, results(selective_scan, arguments, *given)["y"])
    with torch.no_grad():
        assert torch.equal(selective_scan(**{**arguments, "u": arguments["u"].requires_grad_()}), y)


def test_gradients_of_which_the_forward_pass_was_not_told() -> None:
    arguments, *given = _case(2, 40, 6, 4)

    def keeps_nothing(return_last_state: bool, **arguments: Any) -> tuple[Tensor, Tensor]:
        y, last_state, _ = _forward_op(*arguments.values(), return_last_state, False)
        return y.transpose(1, 2), last_state

    _assert_equal(results(keeps_nothing, arguments, *given), results(selective_scan, arguments, *given))


@pytest.mark.parametrize("output", ["y", "last_state"])
def test_gradients_through_one_output_alone(output: str) -> None:
    arguments, *_ = _case(2, 39, 4, 4)
    grads = []
    for op in (selective_scan, reference):
        u = arguments["u"].detach().requires_grad_()
        y, last_state = op(**{**arguments, "u": u}, return_last_state=True)
        grads.append(torch.autograd.grad({"y": y, "last_state": last_state}[output].square().sum(), u)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("seqlen", [200, 1600])
def test_error_of_a_model_as_it_starts(seqlen: int) -> None:
    """Below a millionth, also over sequences so long that an exponential's own error, multiplied, would be ten."""
    block, dim = Mamba(16), 32
    arguments, dy, _ = _case(1, seqlen, dim, 16, without=("initial_state",))
    arguments = {
        **arguments, "delta": 0.1 * arguments["delta"], "delta_bias": block.dt_proj.bias.detach(),
        "A": -torch.exp(block.A_log.detach()), "D": block.D.detach(),
    }  # fmt: skip
    dlast = torch.zeros(1, dim, 16)
    exact = results(reference, in_dtype(arguments, torch.float64), dy, dlast)
    for name, value in results(selective_scan, arguments, dy, dlast).items():
        assert (value.double() - exact[name]).norm() <= 1e-6 * exact[name].norm(), name


def test_steps_so_large_and_values_so_small_that_nothing_is_left() -> None:
    """Beside rows of the usual size: the engine's exponential ends at 2^-100 where the reference's ends at 0."""
    arguments, *given = _case(4, 100, 64, 16)
    arguments["delta_bias"] = torch.linspace(-7, 50, 64)
    arguments["u"][0] *= 1e4
    arguments["u"][1] *= 1e-30
    arguments["u"][2, :, 5:] = 0
    given[0][3, :, :-1] = 0
    given[1][2:] = 0
    exact = results(reference, in_dtype(arguments, torch.float64), *given)
    plain = results(reference, arguments, *given)
    for name, value in results(selective_scan, arguments, *given).items():
        assert_as_good(value, plain[name], exact[name], name=name)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_nan_is_not_lost(name: str) -> None:
    arguments, *_ = _case(2, 20, 6, 4)
    assert selective_scan(**{**arguments, name: torch.full_like(arguments[name], torch.nan)}).isnan().all()


def test_rows_do_not_depend_on_their_batch_and_two_runs_are_equal() -> None:
    arguments, dy, dlast = _case(6, 35, 36, 5)
    first = results(selective_scan, arguments, dy, dlast)
    _assert_equal(results(selective_scan, arguments, dy, dlast), first)
    row = {
        name: value[4:5] if isinstance(value, Tensor) and name not in {*SHARED, "delta_bias"} else value
        for name, value in arguments.items()
    }
    alone = results(selective_scan, row, dy[4:5], dlast[4:5])
    for name in OVER_TIME | PER_SEQUENCE:
        assert torch.equal(alone[name][0], first[name][4]), name


@pytest.mark.parametrize("s", range(len(PACKED) - 1))
def test_a_packed_sequence_is_the_sequence_alone(s: int) -> None:
    arguments, dy, dlast = _case(1, 75, 34, 5, cu_seqlens=PACKED)
    packed = results(selective_scan, arguments, dy, dlast)
    for cu_seqlens in (arguments["cu_seqlens"].int(), arguments["cu_seqlens"].repeat_interleave(2)[::2]):
        _assert_equal(results(selective_scan, {**arguments, "cu_seqlens": cu_seqlens}, dy, dlast), packed)
    start, end = PACKED[s], PACKED[s + 1]
    single = {
        name: value[..., start:end] if name in OVER_TIME else value[s : s + 1] if name in PER_SEQUENCE else value
        for name, value in arguments.items()
    }
    alone = results(selective_scan, {**single, "cu_seqlens": None}, dy[..., start:end], dlast[s : s + 1])
    for name in OVER_TIME:
        assert torch.equal(alone[name], packed[name][..., start:end]), name
    for name in PER_SEQUENCE:
        assert torch.equal(alone[name][0], packed[name][s]), name


@pytest.mark.usefixtures("nan_filled")
def test_sequence_limits_never_lead_outside() -> None:
    """In a compiled graph nobody checks them. What lies outside is ignored, and every position is in a sequence."""
    arguments, dy, _ = _case(1, 40, 4, 4, without=("initial_state",), cu_seqlens=[0, 30, 30, 35, 40])
    expected = results(selective_scan, arguments, dy, torch.zeros(4, 4, 4))
    wrong = torch.tensor([-5, 30, -7, 35, 1 << 40])
    _assert_equal(results(selective_scan, {**arguments, "cu_seqlens": wrong}, dy, torch.zeros(4, 4, 4)), expected)


def test_an_empty_batch() -> None:
    arguments, dy, dlast = _case(3, 5, 6, 4)
    shared = {*SHARED, "delta_bias"}
    empty = {
        name: value[:0] if isinstance(value, Tensor) and name not in shared else value
        for name, value in arguments.items()
    }
    got = results(selective_scan, empty, dy[:0], dlast[:0])
    assert got["y"].shape == (0, 6, 5)
    assert not any(value.any() for value in got.values())


def test_any_strides() -> None:
    arguments, dy, dlast = _case(3, 34, 6, 5)
    expected = results(selective_scan, arguments, dy, dlast)

    def spread(value: Any) -> Any:
        """The same values at every second place of every axis, the last axis outermost."""
        if not isinstance(value, Tensor):
            return value
        wide = torch.full([2 * size for size in reversed(value.shape)], torch.nan)
        return wide[(slice(None, None, 2),) * value.dim()].permute(*reversed(range(value.dim()))).copy_(value)

    for change in (spread, lambda value: value.contiguous() if isinstance(value, Tensor) else value):
        changed = {name: change(value) for name, value in arguments.items()}
        _assert_equal(results(selective_scan, changed, change(dy), change(dlast)), expected)


@pytest.mark.parametrize("cu_seqlens", [None, PACKED])
def test_bits_do_not_depend_on_the_threads(cu_seqlens: list[int] | None, threads: Any) -> None:
    arguments, *given = _case(1 if cu_seqlens else 25, 75, 100, 5, cu_seqlens=cu_seqlens)
    threads(1)
    expected = results(selective_scan, arguments, *given)
    for n in (2, 3, 16, 3):
        threads(n)
        _assert_equal(results(selective_scan, arguments, *given), expected)


@pytest.mark.parametrize(("cu_seqlens", "without"), [(None, ()), ([0, 3, 20], BARE)])
def test_opcheck(cu_seqlens: list[int] | None, without: tuple[str, ...]) -> None:
    arguments, dy, dlast = _case(1, 20, 4, 3, without=without, cu_seqlens=cu_seqlens)
    inputs = list(arguments.values())
    leaves = [
        value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    ]
    torch.library.opcheck(_forward_op, (*leaves, True, True))
    torch.library.opcheck(_forward_op, (*inputs, False, False))
    _, _, checkpoints = _forward_op(*inputs, True, True)
    torch.library.opcheck(_backward_op, (dy, dlast, checkpoints, *inputs))
    torch.library.opcheck(_backward_op, (dy, None, checkpoints, *inputs))


@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 20]])
def test_compiles_whole(cu_seqlens: list[int] | None) -> None:
    arguments, *given = _case(1, 20, 4, 4, cu_seqlens=cu_seqlens)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    _assert_equal(results(compiled, arguments, *given), results(selective_scan, arguments, *given))


def test_exports() -> None:
    class Scan(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return selective_scan(u, delta, A, B, C, delta_softplus=True)

    arguments, *_ = _case(2, 20, 4, 4)
    inputs = tuple(arguments[name] for name in ("u", "delta", "A", "B", "C"))
    program = torch.export.export(Scan(), inputs, strict=False)
    assert torch.equal(program.module()(*inputs), Scan()(*inputs))
