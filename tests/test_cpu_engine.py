"""The numba engine against the reference: values, every gradient, threads, forks, and what a custom op must do."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests._bounds import assert_as_good, cast, gradients

pytest.importorskip("numba", reason="numba is not installed")

from fastm2rec import cpu
from fastm2rec.cpu import compiler, slices
from fastm2rec.cpu import last_scan as engine
from fastm2rec.cpu import threads as module_of_threads
from fastm2rec.cpu.arrays import scratch
from fastm2rec.cpu.last_scan import _backward_op, _forward_op, last_scan
from fastm2rec.reference.last_scan import last_scan as reference
from fastm2rec.reference.mamba import Mamba

NAMES = ("y", "dp", "dx_proj", "ddt_proj", "dbias", "dA", "dD", "dz")


def _inputs(
    lengths: list[int], dim: int = 20, dstate: int = 3, dt_rank: int = 2, *, bias: bool = True, z: bool = True
) -> list[Any]:
    """Step sizes about 0.1 and every state alive: nothing is lost in the decay."""
    batch, seqlen = len(lengths), max(lengths)
    return [
        torch.randn(batch, seqlen, dim),
        torch.randn(dt_rank + 2 * dstate, dim) * dim**-0.5,
        torch.randn(dim, dt_rank) * dt_rank**-0.5,
        torch.rand(dim) * 3 - 4 if bias else None,
        -torch.arange(1.0, dstate + 1) * torch.exp(0.1 * torch.randn(dim, dstate)),
        torch.randn(dim),
        torch.randn(batch, dim) if z else None,
        torch.tensor(lengths),
    ]


def _check(name: str, values: list[Any]) -> None:
    got, plain, exact = values
    assert_as_good(got, plain, exact, name=name)


@pytest.fixture
def finely_sliced(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    """Every row, and every group of rows, may go to another thread."""
    monkeypatch.setattr(engine, "SLICE", 1)
    threads(3)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize(
    ("lengths", "stride", "dim", "dstate", "dt_rank", "bias", "z"),
    [
        ([1, 7, 50, 63, 200, 201], 1, 128, 16, 4, True, True),
        ([201, 1, 2, 200, 8, 9, 63, 50, 17], 2, 20, 3, 1, True, False),
        ([63, 7, 1], 3, 33, 32, 5, False, True),
        ([1], 1, 1, 1, 1, False, False),
        ([50], 1, 40, 17, 3, True, True),
        ([64] * 8 + [3], 3, 31, 2, 2, True, True),
        ([1, 2, 5, 3] * 34 + [4], 1, 20, 3, 2, True, True),  # so many that sixteen rows are summed together
    ],
)
def test_values_and_gradients(
    lengths: list[int], stride: int, dim: int, dstate: int, dt_rank: int, bias: bool, z: bool
) -> None:
    inputs = _inputs(lengths, dim, dstate, dt_rank, bias=bias, z=z)
    dy = torch.randn(len(lengths), dim)
    got = gradients(partial(last_scan, stride=stride), inputs, dy)
    plain = gradients(partial(reference, stride=stride), inputs, dy)
    exact = gradients(partial(reference, stride=stride), cast(inputs, torch.float64), dy)
    present = [name for name in NAMES if not (name == "dbias" and not bias) and not (name == "dz" and not z)]
    for name, *values in zip(present, got, plain, exact, strict=True):
        _check(name, values)
    # In float64 it computes the same sums in another order; these are short enough to lose ten units in the last place.
    got = gradients(partial(last_scan, stride=stride), cast(inputs, torch.float64), dy)
    for name, a, b in zip(present, got, exact, strict=True):
        assert (a - b).abs().max() <= 1e-13 * b.abs().max(), name


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dim", [64, 33])
def test_channels_in_another_order(dim: int) -> None:
    """The convolution's channels may come in any order; all else, and its gradients, stay as they are."""
    inputs = cast(_inputs([9, 70, 1], dim), torch.float64)
    order, dy = torch.randperm(dim), torch.randn(3, dim).double()
    p, *rest = inputs
    assert p is not None
    moved = [p[:, :, order], *rest]
    expected = gradients(reference, inputs, dy)
    expected[1] = expected[1][:, :, order]
    for function in (last_scan, reference):
        got = gradients(partial(function, order=order), moved, dy)
        for name, a, b in zip(NAMES, got, expected, strict=True):
            assert (a - b).abs().max() <= 1e-13 * b.abs().max(), name


@pytest.mark.parametrize("seqlen", [200, 1600])
def test_error_of_a_model_as_it_starts(seqlen: int) -> None:
    """Below a millionth, also over sequences so long that a plain sum over time loses two."""
    block = Mamba(64)
    p, z = torch.randn(4, seqlen, 128), torch.randn(4, 128)
    inputs = [
        p, block.x_proj.weight, block.dt_proj.weight, block.dt_proj.bias, -torch.exp(block.A_log), block.D, z,
        torch.full((4,), seqlen),
    ]  # fmt: skip
    exact = gradients(reference, cast(inputs, torch.float64), torch.ones(4, 128))
    for name, a, b in zip(NAMES, gradients(last_scan, inputs, torch.ones(4, 128)), exact, strict=True):
        assert (a.double() - b).norm() <= 1e-6 * b.norm(), name


@pytest.mark.usefixtures("nan_filled")
def test_states_that_have_forgotten() -> None:
    """Steps so large that most states, tiles and positions drop out; the last channels forget at once."""
    inputs = _inputs([200, 3, 64, 120], dim=128, dstate=16, dt_rank=4)
    inputs[3] = torch.linspace(-7, 6, 128)
    inputs[4] = -torch.arange(1.0, 17) * torch.exp(0.1 * torch.randn(128, 16))
    dy = torch.randn(4, 128)
    got, plain, exact = (
        gradients(f, values, dy)
        for f, values in ((last_scan, inputs), (reference, inputs), (reference, cast(inputs, torch.float64)))
    )
    for name, *values in zip(NAMES, got, plain, exact, strict=True):
        _check(name, values)
    double = gradients(last_scan, cast(inputs, torch.float64), dy)
    for name, a, b in zip(NAMES, double, exact, strict=True):
        assert (a - b).abs().max() <= 1e-13 * b.abs().max(), name
    # Where every channel forgets fast, nothing is left of a row's start; it is not read, and may be anything.
    inputs[3] = torch.full((128,), 5.0)
    before = gradients(last_scan, inputs, dy)
    inputs[0][:, :-100] = torch.nan
    for name, a, b in zip(NAMES, gradients(last_scan, inputs, dy), before, strict=True):
        assert torch.equal(a[:1], b[:1]) if name in ("y", "dp", "dz") else True, name


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("optional", [True, False])
def test_gradcheck(stride: int, optional: bool) -> None:
    inputs: list[Any] = [*cast(_inputs([5, 1, 4], 3, 2, 2, bias=optional, z=optional), torch.float64)]
    *leaves, lengths = inputs
    wanted: Any = [leaf if leaf is None else leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(partial(last_scan, lengths=lengths, stride=stride), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = cast(_inputs([50, 7]), dtype)
    dy = torch.randn(2, 20, dtype=dtype)
    exact = gradients(reference, cast(inputs, torch.float64), dy)
    for name, *values in zip(
        NAMES, gradients(last_scan, inputs, dy), gradients(reference, inputs, dy), exact, strict=True
    ):
        _check(name, values)


def test_any_strides_and_rows_that_do_not_depend_on_their_batch() -> None:
    *inputs, z, lengths = _inputs([63, 1, 50, 8, 9, 63, 2, 30, 31, 32])
    dy = torch.randn(10, 20)
    expected = gradients(last_scan, [*inputs, z, lengths], dy)
    wide = torch.randn(20, 63, 80)
    wide[::2, :, ::4] = inputs[0]
    channel_first = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    for p in (wide[::2, :, ::4], channel_first):
        views = [p, *(x if x is None or x.dim() == 1 else x.t().contiguous().t() for x in (*inputs[1:], z)), lengths]
        for name, a, b in zip(NAMES, gradients(last_scan, views, dy), expected, strict=True):
            assert torch.equal(a, b), name
    for row in range(10):
        one = slice(row, row + 1)
        got = gradients(last_scan, [inputs[0][one], *inputs[1:], z[one], lengths[one]], dy[one])
        for place in (0, 1, 7):  # y, dp, dz
            assert torch.equal(got[place], expected[place][one]), (row, NAMES[place])


def test_padding_and_skipped_positions_are_not_read_and_get_no_gradient() -> None:
    inputs = _inputs([9, 4])
    dy = torch.randn(2, 20)
    before = gradients(partial(last_scan, stride=2), inputs, dy)
    unused = torch.ones(2, 9, dtype=torch.bool)
    unused[0, 0:9:2] = False
    unused[1, 1:4:2] = False
    assert not before[1][unused].any()
    inputs[0][unused] = torch.nan
    for a, b in zip(gradients(partial(last_scan, stride=2), inputs, dy), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("place", range(7))
def test_nan_is_not_lost(place: int) -> None:
    """exp, softplus and sigmoid clamp their argument: a NaN must come through, or a diverged training looks well."""
    inputs = _inputs([9, 4])
    inputs[place] = torch.full_like(inputs[place], torch.nan)
    assert last_scan(*inputs).isnan().all()


def test_extreme_inputs_stay_finite_and_right() -> None:
    """Beside a row of the usual size: the engine's exp ends at 2^-100 where the reference's ends at 0."""
    inputs = _inputs([30, 30, 30])
    inputs[0][0] *= 1e4
    inputs[0][1] *= 1e-30
    dy = torch.randn(3, 20)
    exact = gradients(reference, cast(inputs, torch.float64), dy)
    for name, *values in zip(
        NAMES, gradients(last_scan, inputs, dy), gradients(reference, inputs, dy), exact, strict=True
    ):
        _check(name, values)


@pytest.mark.usefixtures("finely_sliced")
def test_bits_do_not_depend_on_the_threads(threads: Any) -> None:
    inputs = _inputs([63, 1, 50, 8, 9] * 5, 40, 5)
    dy = torch.randn(25, 40)
    results = []
    for n in (1, 2, 3, 16, 3):
        threads(n)
        results.append(gradients(last_scan, inputs, dy))
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.usefixtures("finely_sliced")
def test_sixteen_threads_at_once() -> None:
    cases = []
    for n in range(16):
        inputs, dy = _inputs([63, 1 + n, 50, 8, 9] * 2), torch.randn(10, 20)
        cases.append((inputs, dy, gradients(last_scan, inputs, dy)))
    barrier = threading.Barrier(16)
    wrong: list[Any] = []

    def hammer(inputs: list[Any], dy: Tensor, expected: list[Tensor]) -> None:
        torch.set_num_threads(3)
        barrier.wait()
        try:
            for _ in range(10):
                got = gradients(last_scan, inputs, dy)
                if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                    wrong.append("a result changed")
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=hammer, args=case) for case in cases]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("finely_sliced")
def test_a_forked_child_computes_the_same() -> None:
    inputs, dy = _inputs([63, 1, 50, 8, 9] * 4), torch.randn(20, 20)
    p, W, W_dt, bias, A, D, z, lengths = inputs
    packed = engine.pack(W, W_dt, bias, A, D, torch.float32)

    def compute() -> list[Tensor]:
        y, low_rank = engine.launch_forward(p, packed, z, lengths, 1, True)
        return [y, *engine.launch_backward(dy, low_rank, p, packed, True, z, lengths, 1)]

    expected = compute()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for threads that it does not have is killed
        same = False
        try:
            same = all(torch.equal(a, b) for a, b in zip(compute(), expected, strict=True))
        finally:
            os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert all(torch.equal(a, b) for a, b in zip(compute(), expected, strict=True))


@pytest.fixture(params=["openmp", "pool"])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to threads: torch's, where it has OpenMP, and Python's."""
    if request.param == "pool":
        monkeypatch.setattr(slices, "openmp", lambda: False)
    elif not slices.openmp():
        pytest.skip("this torch has no OpenMP library with GOMP_parallel")
    return request.param


@slices.sliced
def _counted(first, last, scratch, rounds, seen, turns):
    """How often each place was in a slice, and whether its thread had had one before."""
    value = 0.5
    for _ in range(rounds):  # the chaos keeps a compiler from leaving it out
        value = 3.9 * value * (1.0 - value)
    scratch[0] += 1.0 + 0.0 * value
    for i in range(first, last):
        seen[i] += 1.0
        turns[i] = scratch[0]


def test_slices_run_at_once(workers: str, threads: Any) -> None:
    """Of three slices that take a tenth of a second each no thread gets two."""
    threads(3)
    for rounds in (0, 50_000_000):
        with scratch(3 * module_of_threads.LINE, torch.float32) as memory:
            memory[: 3 * module_of_threads.LINE] = 0.0
        seen, turns = np.zeros(3), np.zeros(3)
        module_of_threads.run(_counted, (rounds, seen, turns), 3, 1, 1, torch.float32)
        assert seen.tolist() == [1, 1, 1]
    assert turns.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("count", "grain"), [(0, 1), (1, 1), (1, 5), (7, 1), (100, 3), (1000, 7), (64, 64)])
def test_every_place_is_in_one_slice(workers: str, threads: Any, count: int, grain: int) -> None:
    seen, turns = np.zeros(count + 1), np.zeros(count + 1)
    for n in (1, 2, 5):
        threads(n)
        seen[:] = 0.0
        module_of_threads.run(_counted, (0, seen, turns), count, grain, 1, torch.float32)
        assert (seen[:count] == 1).all()
        assert seen[count] == 0


@slices.sliced
def _multiplied(first, last, scratch, x, y, out):
    for i in range(first, last):
        out[i] = x[i] * y[i]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 is told to")
def test_what_is_too_small_to_be_normal_is_zero_in_kernels_alone(workers: str, threads: Any) -> None:
    """As a product and as a factor; and the caller's threads compute afterwards as they did before."""
    threads(2)
    x, y = np.full(64, 1e-30, np.float32), np.full(64, 1e-9, np.float32)
    for a, b in ((x, y), (x * y, np.full(64, 1e30, np.float32))):
        assert (a * b > 0).all()
        out = np.ones(64, np.float32)
        module_of_threads.run(_multiplied, (a, b, out), 64, 1, 1, torch.float32)
        assert (out == 0).all()
        assert (a * b > 0).all()
    many = torch.full((100_000,), 1e-30)
    assert (many * 1e-9 > 0).all()  # on all of torch's threads
    module_of_threads.run(_multiplied, (np.ones(64), np.ones(64), out64 := np.zeros(64)), 64, 1, 1, torch.float64)
    assert (out64 == 1).all()


@pytest.mark.usefixtures("finely_sliced")
def test_both_ways_to_threads_compute_the_same(workers: str) -> None:
    inputs = _inputs([63, 1, 50, 8] * 3)
    dy = torch.randn(12, 20)
    got = gradients(last_scan, inputs, dy)
    torch.set_num_threads(1)
    for name, a, b in zip(NAMES, got, gradients(last_scan, inputs, dy), strict=True):
        assert torch.equal(a, b), name


def test_an_empty_batch_and_a_length_that_nobody_checked() -> None:
    inputs = _inputs([5, 3])
    empty = [inputs[0][:0], *inputs[1:6], inputs[6][:0], inputs[7][:0]]
    got = gradients(last_scan, empty, torch.empty(0, 20))
    assert got[0].shape == (0, 20)
    assert not any(gradient.any() for gradient in got)
    expected = last_scan(*inputs)
    for wrong in (0, -3, 6, 2**40):
        inputs[-1][1] = wrong
        y, dp, *_ = gradients(last_scan, inputs, torch.ones(2, 20))
        assert torch.equal(y[0], expected[0])
        assert y[1].isnan().all()
        assert dp[1].isnan().all()


@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(optional: bool) -> None:
    *leaves, lengths = _inputs([9, 2], bias=optional, z=optional)
    order = torch.randperm(20) if optional else None
    plain = [*leaves, lengths, 2, order]
    y, low_rank = _forward_op(*plain, True)
    torch.library.opcheck(_backward_op, (y, low_rank, *plain))
    leaves = [x if x is None else x.requires_grad_() for x in leaves]
    torch.library.opcheck(_forward_op, (*leaves, lengths, 2, order, True))
    torch.library.opcheck(_forward_op, (*plain, False))


def test_compile_and_export() -> None:
    inputs = _inputs([9, 2])
    dy = torch.randn(2, 20)
    compiled = torch.compile(last_scan, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, inputs, dy), gradients(last_scan, inputs, dy), strict=True):
        assert torch.equal(a, b)

    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Tensor:
            return last_scan(*args)

    program = torch.export.export(Module(), tuple(inputs), strict=False)
    assert torch.equal(program.module()(*inputs), last_scan(*inputs))


def test_numba_is_imported_when_a_kernel_runs_and_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.missing() is None
    monkeypatch.setattr(cpu, "_HAS_NUMBA", False)
    assert cpu.missing() == "numba is not installed (pip install 'fastm2rec[cpu]')"
    code = "import sys, fastm2rec, fastm2rec.cpu.last_scan; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_place_without_a_cache_still_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(function: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return "compiled"

    monkeypatch.setattr(compiler, "njit", njit)
    assert compiler.entry(lambda: None) == "compiled"
