"""The inference benchmarks: what is measured is checked first, what cannot run says why, and the record is complete."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import (
    _assembled,
    _bounds,
    _driver,
    _failure,
    _inference,
    _merge,
    _modes,
    _plan,
    _registry,
    _results,
    _timing,
    latency,
    memory,
    scaling,
    throughput,
)
from fastm2rec import _mamba_ssm
from fastm2rec.reference.causal_conv1d import causal_conv1d
from fastm2rec.reference.selective_scan import selective_scan

SIZES = _registry.Sizes(50, 4, 5, torch.float32, torch.device("cpu"), text_dim=8)
SHAPE = _driver.Shape("float32", 7, 3, 50)
FLAGS = ["--d-state", "4", "--n-items", "50", "--device", "cpu", "--seq-len", "7"]
CEILINGS = _bounds.Ceilings(1e9, 1e9, 1e9)


@pytest.fixture(scope="module")
def cases() -> list[_registry.Case]:
    with torch.no_grad():
        return [case for case in _registry.cases(_registry.MODELS, 7, SIZES) if not case.is_late]


@pytest.fixture(scope="module")
def inputs() -> _inference._Inputs:
    return _inference._Inputs(SHAPE, SIZES)


def test_every_model_and_peer_has_a_row() -> None:
    with torch.no_grad():
        made = _registry.cases(_registry.MODELS, 7, SIZES)
    rows = {(case.model, case.impl, case.mode) for case in made}
    late = [(case.model, case.impl) for case in made if case.is_late]
    assert late[0] == ("sasrec", "last query"), "the peer of all ratios is compiled before time runs out"
    for model in ("sasrec", "bert4rec"):
        for impl in ("as published", "last query"):
            assert {(model, impl, "eager"), (model, impl, "compiled")} <= rows
    for impl in ("reference", "torch.fft + loop", "torch.fft + mamba_ssm", "triton", "cpu", "mamba_ssm"):
        assert ("m2rec", impl, "eager") in rows, "what is missing is listed, not left out"
    assert {("m2rec", "triton", "folded"), ("m2rec", "cpu", "folded")} <= rows
    assert {("mamba4rec", "reference", "eager"), ("mamba4rec", "torch + mamba_ssm", "eager")} <= rows


@torch.inference_mode()
def test_what_runs_is_right_and_what_does_not_says_why(cases: list[_registry.Case], inputs: _inference._Inputs) -> None:
    for case in cases:
        if case.skipped is not None:
            assert len(case.skipped) > 10
            continue
        answer = case.answer(5)
        assert _inference.error_of(answer, case, inputs) < _inference.TOLERANCE[torch.float32]
        _, scores, ids = answer(*inputs.batches[0])
        assert case.encode is not None
        assert case.table is not None
        everything = case.encode(*inputs.batches[0]) @ case.table.t()
        everything[:, 0] = -torch.inf
        assert torch.equal(ids, everything.topk(5).indices)
        # A product with one column less may sum in another order: a few roundings of the largest score.
        torch.testing.assert_close(scores, everything.gather(1, ids), rtol=0, atol=4e-7 * float(scores.abs().max()))


@pytest.mark.parametrize("wrong", ["query", "scores", "ids"])
@torch.inference_mode()
def test_each_part_of_an_answer_is_checked(wrong: str, cases: list[_registry.Case], inputs: _inference._Inputs) -> None:
    case = next(case for case in cases if case.impl == "reference")
    right = case.answer(5)

    def answer(*batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, scores, ids = right(*batch)
        query, scores = query * (1.01 if wrong == "query" else 1), scores * (1.01 if wrong == "scores" else 1)
        return query, scores, (ids - 2) % 50 + 1 if wrong == "ids" else ids

    assert _inference.error_of(answer, case, inputs) > 50 * _inference.TOLERANCE[torch.float32]


def test_a_wrong_or_failing_implementation_gets_no_time_and_stops_no_other(
    cases: list[_registry.Case], inputs: _inference._Inputs
) -> None:
    good = next(case for case in cases if case.impl == "reference")
    encode = good.encode
    assert encode is not None
    calls = 0

    def later(*batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
        return encode(*batch)

    def broken(*batch: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    def case(name: str, function: Callable[..., Tensor]) -> _registry.Case:
        return _registry.Case("m2rec", name, "eager", good.config, function, good.check, good.table)

    made = [good, case("bad", lambda *batch: encode(*batch) * 1.01), case("broken", broken), case("later", later)]
    jobs = [_inference.job(one, inputs, SIZES) for one in made]
    ready = _driver.checked(jobs, _driver.Budget(0.0, 1), SIZES.device)
    _driver.fill_times(ready, SIZES.device, CEILINGS, 0.0)
    rows = [job.row for job in jobs]
    assert rows[0].median_ms is not None
    assert rows[0].skipped is None
    assert all(row.median_ms is None for row in rows[1:])
    assert rows[1].skipped is not None
    assert rows[1].skipped.startswith("wrong: differs from its reference by 1")
    assert rows[2].skipped == "RuntimeError: no such kernel"
    assert rows[3].skipped == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB ... more"


def test_a_model_assembled_from_mamba_ssm_is_the_model(
    monkeypatch: pytest.MonkeyPatch, cases: list[_registry.Case], inputs: _inference._Inputs
) -> None:
    monkeypatch.setattr(_mamba_ssm, "selective_scan", selective_scan)
    monkeypatch.setattr(_mamba_ssm, "causal_conv1d", causal_conv1d)
    for name in ("m2rec", "mamba4rec"):
        model = _registry.build("m2rec", _registry.mamba_fields(name, 7, SIZES), SIZES)
        expected = _assembled.like(model, "loop")(*inputs.batches[0])
        got = _assembled.like(model, "mamba_ssm")(*inputs.batches[0])
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(got, model.encode(*inputs.batches[0]), rtol=1e-4, atol=1e-5)


def test_a_budget_shares_out_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(_driver.time, "perf_counter", lambda: now)
    budget = _driver.Budget(100.0, 2)
    assert budget.begin() == _driver.MEASURE_SHARE * 50
    now = 72.0
    assert budget.may_compile()  # 20 seconds, and 8 for the shape that waits
    now = 72.1
    assert not budget.may_compile()
    now = 101.0
    assert budget.begin() is None
    assert _driver.Budget(0.0, 1).begin() == 0.0, "the first shape always runs"
    now = 0.0
    budget = _driver.Budget(10.0, 2, limit=50.0)
    budget.begin()
    now = 22.0
    assert budget.may_compile(), "what is begun in the budget may end after it"
    now = 22.1
    assert not budget.may_compile()
    now = 30.0
    assert budget.may_compile(first=True), "of the shape at hand the peer of all ratios"
    now = 30.1
    assert not budget.may_compile(first=True)
    now = 51.0
    assert budget.until_limit() == 0.0
    now = 0.0
    budget = _driver.Budget(100.0, 2)
    budget.begin()
    now = 72.1
    assert not budget.may_compile(first=True), "without a limit every shape has something"


def _run(root: Path, script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"bench/{script}.py", *FLAGS, *flags],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_run_from_the_shell(root: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    flags = ["--batch", "3", "--topk", "5", "--dtype", "float32", "--eager-only", "--budget-seconds", "1"]
    done = _run(root, "latency", *flags, "--out", str(out), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["schema"] == 1
    assert {"device", "torch", "triton", "python", "commit", "kernels_tree", "created", "rows"} <= document.keys()
    measured = [row for row in document["rows"] if row["median_ms"] is not None]
    assert {row["model"] for row in measured} == set(_registry.MODELS)
    for row in measured:
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["sequences_per_s"] == pytest.approx(row["batch"] / row["median_ms"] * 1e3)
        assert row["bound_share"] == pytest.approx(row["bound_ms"] / row["median_ms"])
        assert row["cpu_ms"] > 0
        assert row["max_rel_err"] < 1e-4
        assert (row["script"], row["phase"], row["threads"]) == ("latency", "inference", torch.get_num_threads())
    assert "x SASRec, batch 3, length 7, 50 items: against " in done.stdout
    assert "skipped: " in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_memory_from_the_shell(root: Path, tmp_path: Path) -> None:
    # A process of its own: memory.py changes how this one's heap works.
    out = tmp_path / "rows.json"
    flags = [
        "--batch",
        "2",
        "--models",
        "sasrec",
        "m2rec",
        "--dtype",
        "float32",
        "--eager-only",
        "--budget-seconds",
        "1",
    ]
    done = _run(root, "memory", *flags, "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    for phase in ("inference", "training"):
        assert {row["model"] for row in rows if row["phase"] == phase and row["peak_mem_mb"]} == {"sasrec", "m2rec"}
    assert all(row["median_ms"] is None for row in rows)


@pytest.mark.skipif(memory._memory.unavailable(torch.device("cpu")) is not None, reason="needs Linux's peak of the RSS")
def test_memory_is_what_a_call_holds(root: Path) -> None:
    code = (
        "import torch; from bench import _memory; _memory.no_reuse()\n"
        "x = torch.ones(2**22)\n"
        "def call(turn):\n"
        "    y = x + 1\n"  # 16 MB, and the next line 32 MB beside it
        "    return (y.double() * 0).sum()\n"
        "call(0); print(_memory.peak_mb(call, torch.device('cpu')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    # y, its double and the product: 16 + 32 + 32. A page more or less per block, and the heap's small change.
    assert float(done.stdout) == pytest.approx(80, abs=1.0)


def test_every_row_is_written_as_soon_as_it_exists(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = _options("throughput", "--batch", "1", "2", "--out", str(out))
    seen = []

    def make(shape: _driver.Shape) -> list[_driver.Job]:
        seen.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)
        if shape.batch == 2:
            raise MemoryError("too large")
        row = _inference._row("m2rec", "x", "eager", 4, shape)
        return [_driver.Job(row, lambda: (lambda turn: None, 0.0), 1.0)]

    empty = _inference.Jobs(options).empty
    shapes = [_driver.Shape("float32", 7, batch, 50) for batch in (1, 2, 1)]
    rows = _driver.sweep(options, "throughput", shapes, make, empty)
    assert seen == [0, 1, 5]
    assert [row.skipped for row in rows[1:5]] == ["MemoryError: too large"] * 4
    assert rows[5].median_ms is not None


def test_what_needs_no_compiler_is_written_before_one_is_started(tmp_path: Path) -> None:
    """A process that is ended while it compiles has lost no row, and leaves none that counts as done."""
    out = tmp_path / "rows.json"
    options = _options("throughput", "--batch", "1", "--budget-seconds", "100", "--out", str(out))
    shape = _driver.Shape("float32", 7, 1, 50)
    before: list[dict[str, Any]] = []

    def compiling() -> tuple[Callable[[int], object], float]:
        before.extend(json.loads(out.read_text())["rows"])
        return lambda turn: None, 0.0

    def make(shape: _driver.Shape) -> list[_driver.Job]:
        rows = [_inference._row("sasrec", "x", mode, None, shape) for mode in ("compiled", "eager", "graph")]
        rows[2].skipped = "no graph here"
        return [
            _driver.Job(rows[0], compiling, 1.0, is_late=True),
            _driver.Job(rows[1], lambda: (lambda turn: None, 0.0), 1.0),
            _driver.Job(rows[2]),
        ]

    rows = _driver.sweep(options, "throughput", [shape], make, _inference.Jobs(options).empty)
    assert [row["mode"] for row in before] == ["compiled", "eager", "graph"]
    assert before[1]["median_ms"] is not None
    assert [_merge.is_final(row) for row in before] == [False, True, True]
    assert [row.median_ms is not None for row in rows] == [True, True, False]
    after = json.loads(out.read_text())["rows"]
    assert [(row["mode"], row["median_ms"]) for row in after] == [(row.mode, row.median_ms) for row in rows]
    merged = tmp_path / "merged.json"
    step = _plan.Step("throughput", 1, True, ("sasrec",), (7,), (1,), ("float32",))
    head = {name: value for name, value in json.loads(out.read_text()).items() if name != "rows"}
    for found, missing in ((before, (7,)), (after, ())):
        _merge.merge(merged, {**head, "rows": found}, "throughput")
        assert step.missing(json.loads(merged.read_text())["rows"]) == missing


class _Gpu:
    """One that a call may lose: from then on everybody fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_lost = False
        monkeypatch.setattr(_failure, "is_lost", lambda device: self.is_lost)

    def call(self, turn: int) -> None:
        if self.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def lose(self, turn: int) -> None:
        self.is_lost = True
        self.call(turn)

    def job(self, mode: str, *, when: str = "never", is_late: bool = False) -> _driver.Job:
        def prepare() -> tuple[Callable[[int], object], float]:
            (self.lose if when == "prepared" else self.call)(0)
            turns = iter(range(99))
            if when == "timed":
                return lambda turn: (self.lose if next(turns) > 8 else self.call)(turn), 0.0
            return self.call, 0.0

        return _driver.Job(_inference._row("m2rec", "x", mode, 4, SHAPE), prepare, 1.0, is_late=is_late)


@pytest.mark.parametrize(
    ("when", "late", "measured"),
    [
        ("prepared", False, []),
        ("prepared", True, ["first", "last"]),
        ("timed", False, ["first", "last"]),
    ],
)
def test_a_lost_gpu_is_said_and_the_rest_waits(
    when: str, late: bool, measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What an illegal access leaves: one row with the reason, the others to be measured by another process."""
    monkeypatch.setattr(_timing, "CPU_SAMPLE_SECONDS", 0.0)
    gpu, out = _Gpu(monkeypatch), tmp_path / "rows.json"
    options = _options("throughput", "--batch", "3", "--budget-seconds", "100", "--out", str(out))

    def make(shape: _driver.Shape) -> list[_driver.Job]:
        return [gpu.job("first"), gpu.job("bad", when=when, is_late=late), gpu.job("last")]

    with pytest.raises(SystemExit) as ended:
        _driver.sweep(options, "throughput", [SHAPE, SHAPE], make, _inference.Jobs(options).empty)
    assert ended.value.code == _failure.EXIT_CODE
    rows = json.loads(out.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["first", "bad", "last"], "the second shape is not begun"
    said = "lost the GPU: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert rows[1]["skipped"] == said
    assert rows[1]["median_ms"] is None
    assert _merge.is_final(rows[1])
    assert [row["mode"] for row in rows if row["median_ms"] is not None] == measured
    waiting = [row for row in rows if row["skipped"] not in (None, said)]
    assert [row["skipped"] for row in waiting] == [_failure.WAITING] * (2 - len(measured))
    assert not any(map(_merge.is_final, waiting))
    assert "in prepare" in capsys.readouterr().err or when == "timed", "the whole traceback"
    left_out = _options("throughput", "--leave-out", _results.row_label(rows[1]))
    assert [_driver._wanted(job.row, left_out) for job in make(SHAPE)] == [True, False, True]


def test_an_error_that_the_gpu_outlives_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    device, seen = torch.device("cuda"), iter([RuntimeError("late"), None, *[RuntimeError("sticky")] * 2])

    def synchronize(device: torch.device) -> None:
        error = next(seen)
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert not _failure.is_lost(device)
    assert _failure.is_lost(device)
    assert not _failure.is_lost(torch.device("cpu"))


def test_a_reason_is_how_a_message_begins_and_ends() -> None:
    assert _failure.reason(ValueError("at 37:12:\n\n    x = y\n  y is not defined\n")) == (
        "ValueError: at 37:12: ... y is not defined"
    )
    assert _failure.reason(KeyError()) == "KeyError"
    assert len(_failure.reason(ValueError("x" * 999))) < 350


def test_what_is_compiled_may_be_said() -> None:
    def wanted(*flags: str) -> list[tuple[str, str]]:
        rows = [
            _inference._row("sasrec", impl, mode, None, SHAPE) for impl in ("x", "y") for mode in ("eager", "compiled")
        ]
        return [(row.impl, row.mode) for row in rows if _driver._wanted(row, _options("latency", *flags))]

    assert wanted("--compile", "x") == [("x", "eager"), ("x", "compiled"), ("y", "eager")]
    assert wanted("--impls", "y") == [("y", "eager"), ("y", "compiled")]


def _options(script: str, *flags: str) -> argparse.Namespace:
    module = {"throughput": throughput, "latency": latency, "scaling": scaling, "memory": memory}[script]
    return module.parse([*FLAGS, *flags])


def test_scaling_moves_one_axis_at_a_time() -> None:
    options = _options("scaling", "--batch", "4", "1", "--catalogues", "50", "90")
    shapes = scaling.shapes(options)
    assert {(shape.seq_len, shape.batch, shape.n_items) for shape in shapes} == {(7, 4, 50), (7, 1, 50), (7, 4, 90)}
    base = next(iter(shapes))
    assert shapes[base] == ["seq_len", "batch", "n_items"]
    rows = [_inference._row("m2rec", "x", "eager", 4, shape) for shape in shapes]
    with pytest.raises(ValueError, match="expected at least one measured row"):
        scaling.panels(options, rows)
    for row in rows:
        row.median_ms = 1.0
    drawn = {axis: [(r.batch, r.n_items) for r in own] for axis, _, own in scaling.panels(options, rows)}
    assert drawn["batch"] == [(4, 50), (1, 50)]
    assert drawn["n_items"] == [(4, 50), (4, 90)]


@pytest.mark.parametrize("script", [latency, throughput, scaling, memory])
def test_without_a_word_a_script_knows_what_to_measure(script: object) -> None:
    options = script.parse(["--device", "cpu"])  # type: ignore[attr-defined]
    assert options.seq_len
    assert options.batch
    assert options.device == "cpu"


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("latency", ["--seq-len", "0"], "expected a whole number of at least 1, got '0'"),
        ("latency", ["--topk", "99", "--n-items", "50"], "--topk: expected at most --n-items=50, got 99"),
        ("throughput", ["--models", "gpt"], "invalid choice: 'gpt'"),
        ("scaling", ["--record", "--out", "x.json"], "--record: expected no --out beside it"),
    ],
)
def test_wrong_flags(script: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _options(script, *flags)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_rows() -> None:
    device = torch.device("cpu")
    options = _options("latency", "--batch", "2", "--models", "sasrec", "m2rec", "--budget-seconds", "600")
    options.dtype = ["float32"]
    rows = [row for row in latency.run(options) if row.mode == "compiled"]
    assert len(rows) == 3
    reason = _modes.cannot_compile(device)
    assert all((row.median_ms is not None) == (reason is None) for row in rows), [row.skipped for row in rows]


@pytest.mark.gpu
@pytest.mark.parametrize("script", [latency, throughput, memory])
def test_on_a_gpu(script: object, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    flags = ["--seq-len", "50", "--batch", "32", "--models", "m2rec", "sasrec", "--dtype", "bfloat16"]
    skip = ["--impls", "triton", "last query"]  # a compiler would take minutes
    script.main([*flags, *skip, "--budget-seconds", "1", "--out", str(out)])  # type: ignore[attr-defined]
    rows = json.loads(out.read_text())["rows"]
    modes = {row["mode"] for row in rows if row["model"] == "m2rec" and row["skipped"] is None}
    assert {"eager", "folded"} <= modes
    if script is not memory:
        assert {"graph", "folded graph"} <= modes
        assert any(row["model"] == "sasrec" and row["mode"] == "graph" and row["median_ms"] for row in rows)
