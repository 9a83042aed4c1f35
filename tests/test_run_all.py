"""The run book: rows outlive a kill, a run goes on where it stopped, and one script's failure is not the others'."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    _child,
    _correctness,
    _merge,
    _modes,
    _plan,
    _results,
    _targets,
    counters,
    run_all,
    sanitize,
)
from bench._plan import Step

HEAD = {"device": "Z", "device_type": "cpu", "torch": "2", "triton": "3", "python": "3.11", "created": "2026"}
HEAD["kernels_tree"] = _merge.kernels_tree()

# A script as the real ones are: the same flags, a file that is whole after every row.
SCRIPT = """
import argparse, json, os, sys, time
parser = argparse.ArgumentParser()
for flag in ("--models", "--seq-len", "--batch", "--dtype", "--leave-out"):
    parser.add_argument(flag, nargs="+", default=[])
for flag in ("--device", "--budget-seconds", "--limit-seconds", "--out"):
    parser.add_argument(flag)
options = parser.parse_args()
head, rows = json.loads(os.environ["HEAD"]), []
with open(os.environ["CALLS"], "a") as calls:
    calls.write(" ".join([*options.seq_len, *options.leave_out]) + "\\n")
for length in map(int, options.seq_len):
    if length == 13:
        sys.exit("thirteen is refused")
    lost = length == 31 and not options.leave_out
    for model in options.models:
        for batch in map(int, options.batch):
            for dtype in options.dtype:
                rows.append({"model": model, "impl": "cpu", "mode": "eager", "dtype": dtype, "batch": batch,
                             "seq_len": length, "median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "skipped": None})
                if lost:
                    rows[-1] |= {"median_ms": None, "skipped": "not measured: another row lost the GPU that both used"}
                    rows.append({**rows[-1], "mode": "graph", "skipped": "lost the GPU: RuntimeError: CUDA error"})
    with open(options.out + ".partial", "w") as file:
        json.dump({**head, "rows": rows}, file)
    os.replace(options.out + ".partial", options.out)
    if lost:
        sys.exit(3)
    if length == 99:
        time.sleep(60)
"""


def _step(script: str, *lengths: int) -> Step:
    return Step(script, 1, True, ("m2rec",), lengths, (1,), ("float32",))


def _run(tmp_path: Path, seconds: float = 60.0, **head: Any) -> run_all.Run:
    scripts, out = tmp_path / "scripts", tmp_path / "out"
    scripts.mkdir(exist_ok=True)
    out.mkdir(exist_ok=True)
    for name in ("one", "two"):
        (scripts / f"{name}.py").write_text(SCRIPT)
    header = {**HEAD, **head}
    environment = {**os.environ, "HEAD": json.dumps(header), "CALLS": str(tmp_path / "calls")}
    run = run_all.Run(out, header, environment, time.monotonic() + seconds)
    run.scripts = scripts
    return run


def _lengths(out: Path, script: str) -> list[int]:
    found = _merge.read(out / f"{script}.json")
    return [] if found is None else [row["seq_len"] for row in found["rows"]]


def _calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def _status(run: run_all.Run) -> dict[str, str]:
    return {row["name"].split(" --models")[0]: row["status"] for row in run.state["rows"]}


def test_a_script_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_plan, "CPU", (_step("one", 7, 13, 50), _step("absent", 7), _step("two", 50)))
    run = _run(tmp_path)
    run.all_steps()
    assert _status(run) == {"one": "failed", "absent": "not begun: bench/absent.py does not exist", "two": "done"}
    assert _lengths(run.out, "one") == [7], "its rows from before the failure are kept"
    assert _lengths(run.out, "two") == [50]
    assert "thirteen is refused" in capsys.readouterr().out
    assert "thirteen is refused" in next(row["tail"] for row in run.state["rows"] if row["script"] == "one")


def _clock(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType, is_late: Callable[[], bool]) -> None:
    """Let a deadline pass when something has happened, not after a number of seconds."""
    clock = types.SimpleNamespace(sleep=time.sleep, monotonic=lambda: 1e9 if is_late() else 0.0)
    monkeypatch.setattr(module, "time", clock)


def test_a_step_that_takes_too_long_is_ended_and_its_rows_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    _clock(monkeypatch, _child, lambda: 99 in _lengths(run.out, "one"))
    run.step(_step("one", 7, 99), seconds=30)  # it would sleep for a minute after 99
    assert _status(run) == {"one": "timed out"}
    assert _lengths(run.out, "one") == [7, 99]
    assert not list((run.out / ".parts").iterdir())
    run.step(_step("two", 7), seconds=1.0)
    assert _status(run)["two"] == "not begun: no time left"


@pytest.mark.parametrize("core", [True, False])
def test_a_script_knows_when_it_is_ended(core: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four shapes in 84 s: it believes in no second beyond that, whatever its shapes would like to have."""
    given: list[str] = []

    def run(command: list[str], *others: object) -> _child.Outcome:
        given.extend(command)
        return _child.Outcome(0, 1.0, "")

    monkeypatch.setattr(_child, "run", run)
    _run(tmp_path).step(dataclasses.replace(_step("one", 1, 2, 3, 4), core=core), seconds=84.0)
    budget, limit = (float(given[given.index(flag) + 1]) for flag in ("--budget-seconds", "--limit-seconds"))
    assert limit == 84 - run_all.START_SECONDS - run_all.END_SECONDS
    assert budget == (limit if core else round(run_all.SCRIPT_SHARE * 84 - run_all.START_SECONDS))
    given.clear()
    (tmp_path / "scripts" / "kernels.py").touch()
    _run(tmp_path).step(Step("kernels", 1, core), seconds=84.0)
    assert float(given[given.index("--budget-seconds") + 1]) == 64, "its shapes are short"


def test_a_lost_gpu_costs_one_row(tmp_path: Path) -> None:
    """The process that lost it ends, and another one measures the rest; so do later steps and runs."""
    run = _run(tmp_path)
    run.step(_step("one", 7, 31, 50), seconds=60)
    culprit = "m2rec/cpu/graph/None/None/float32/1/31/None"
    assert _calls(tmp_path) == ["7 31 50", f"31 50 {culprit}"]
    assert _status(run) == {"one": "done"}
    rows = {(row["seq_len"], row["mode"]): row for row in run.rows("one")}
    assert {key: row["median_ms"] for key, row in rows.items()} == {
        (7, "eager"): 1.0, (31, "eager"): 1.0, (31, "graph"): None, (50, "eager"): 1.0,
    }  # fmt: skip
    assert rows[31, "graph"]["skipped"] == "lost the GPU: RuntimeError: CUDA error"
    assert _step("one", 7, 31, 50).missing(run.rows("one")) == ()
    again = _run(tmp_path)
    again.step(_step("one", 80), seconds=60)
    assert _calls(tmp_path)[-1] == f"80 {culprit}"


def test_a_gpu_that_is_lost_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def run_and_lose(*words: object) -> _child.Outcome:
        calls.append(words)
        return _child.Outcome(3, 1.0, "lost")

    monkeypatch.setattr(_child, "run", run_and_lose)
    run = _run(tmp_path)
    run.step(_step("one", 7), seconds=60)
    assert len(calls) == run_all.MOST_LOSSES + 1
    assert _status(run) == {"one": "failed"}


def test_resumes_with_what_is_missing(tmp_path: Path) -> None:
    first = _run(tmp_path)
    first.step(_step("one", 7, 13, 50), seconds=30)
    second = _run(tmp_path)
    second.step(_step("one", 7, 50), seconds=30)
    assert _calls(tmp_path) == ["7 13 50", "50"]
    assert _lengths(second.out, "one") == [7, 50]
    third = _run(tmp_path)
    third.step(_step("one", 7, 50), seconds=30)
    assert len(_calls(tmp_path)) == 2, "nothing was missing"


def test_a_packed_record_goes_on_elsewhere(tmp_path: Path) -> None:
    """The file is whole after every step, and what is unpacked is the record."""
    file = tmp_path / "deep" / "record.tar"
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    run = _run(here)
    run.pack = file
    run.step(_step("one", 7), seconds=30)
    with tarfile.open(file) as tar:
        assert set(tar.getnames()) == {"one.json", "run_all.json", "summary.md"}
        tar.extractall(there / "out", filter="data")
    assert not list(file.parent.glob("*.partial"))
    assert "| done |" in (there / "out" / "summary.md").read_text()
    second = _run(there)
    second.step(_step("one", 7, 50), seconds=30)
    assert _calls(there) == ["50"]
    second.step(_step("two", 7), seconds=30)
    assert _status(second) == {"one": "done", "two": "done"}


def test_rows_of_another_device_do_not_count_and_are_moved_aside(tmp_path: Path) -> None:
    _run(tmp_path).step(_step("one", 7), seconds=30)
    other = _run(tmp_path, device="Y")
    assert other.state["rows"] == []
    other.step(_step("one", 7), seconds=30)
    assert _calls(tmp_path) == ["7", "7"]
    kept = json.loads((other.out / f"one.{HEAD['kernels_tree']}.json").read_text())
    assert kept["device"] == "Z"
    assert json.loads((other.out / "one.json").read_text())["device"] == "Y"


def test_a_part_that_a_kill_left_behind_is_collected(tmp_path: Path) -> None:
    parts = tmp_path / "out" / ".parts"
    parts.mkdir(parents=True)
    row = {"model": "m2rec", "impl": "cpu", "mode": "eager", "dtype": "float32", "batch": 1, "seq_len": 7}
    (parts / "one.json").write_text(json.dumps({**HEAD, "rows": [{**row, "median_ms": 1.0}]}))
    (parts / "two.json").write_text('{"rows": [')
    run = _run(tmp_path)
    assert _lengths(run.out, "one") == [7]
    assert _step("one", 7).missing(run.rows("one")) == ()
    assert run.rows("two") == []


def test_a_time_is_not_lost_to_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    row = {"model": "m2rec", "impl": "cpu", "seq_len": 7}
    late = {**row, "median_ms": None, "skipped": "the time budget ran out (--budget-seconds 3)"}
    for own in (
        late,
        {**row, "median_ms": 2.0},
        late,
        {**row, "impl": "all", "median_ms": None, "skipped": late["skipped"]},
    ):
        _merge.merge(path, {**HEAD, "rows": [own]}, "x")
    assert [one["median_ms"] for one in json.loads(path.read_text())["rows"]] == [2.0]
    _merge.merge(path, {**HEAD, "rows": [{**row, "median_ms": 1.0}]}, "x")
    assert [one["median_ms"] for one in json.loads(path.read_text())["rows"]] == [1.0]
    _merge.merge(path, {**HEAD, "rows": [{**row, "median_ms": None, "skipped": "lost the GPU: x"}]}, "x")
    assert [one["median_ms"] for one in json.loads(path.read_text())["rows"]] == [None], "but to a lost GPU"


def test_quick_rows_say_so_and_are_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    row = {"model": "sasrec", "impl": "x", "batch": 1, "dtype": "float32", "seq_len": 7, "mode": "compiled"}
    short = {**row, "mode": _modes.NO_SEARCH, "median_ms": 1.0}
    _merge.merge(path, {**HEAD, "rows": [short, {**row, "mode": "eager", "median_ms": 3.0}]}, "x", True)
    quick = Step("x", 1, True, ("sasrec",), (7,), (1,), ("float32",), quick=True)
    whole = dataclasses.replace(quick, quick=False)
    rows = json.loads(path.read_text())["rows"]
    assert [one["mode"] for one in rows] == ["compiled, no search", "eager"]
    assert quick.missing(rows) == ()
    assert whole.missing(rows) == (7,)
    late = {**row, "median_ms": None, "skipped": "not compiled: the time budget ran out (--budget-seconds 9)"}
    assert quick.missing([*rows, late]) == (), "what the search had no time for is not the quick step's"
    assert quick.missing([late, {**late, "mode": "eager", "median_ms": 3.0}]) == ()
    assert quick.missing([{**late, "quick": True, "mode": _modes.NO_SEARCH}, rows[1]]) == (7,)
    _merge.merge(path, {**HEAD, "rows": [{**row, "median_ms": 0.9}, {**row, "mode": "eager", "median_ms": 2.9}]}, "x")
    rows = json.loads(path.read_text())["rows"]
    assert {one["mode"]: one["median_ms"] for one in rows} == {
        "compiled, no search": 1.0, "eager": 2.9, "compiled": 0.9,
    }  # fmt: skip
    assert whole.missing(rows) == ()


def test_a_row_that_time_did_not_allow_is_missing() -> None:
    step = _step("one", 7, 50)
    row = {"model": "m2rec", "impl": "cpu", "mode": "eager", "batch": 1, "dtype": "float32", "median_ms": 1.0}
    rows: list[dict[str, Any]] = [{**row, "seq_len": 7}, {**row, "seq_len": 50}]
    assert step.missing(rows) == ()
    late = {**row, "seq_len": 50, "impl": "x", "median_ms": None, "skipped": "not compiled: (--budget-seconds 1)"}
    assert step.missing([*rows, late]) == (50,)
    assert step.missing([*rows, {**late, "skipped": "needs CUDA"}]) == ()
    assert step.missing(rows[:1]) == (50,)
    late |= {"mode": "compiled"}
    assert dataclasses.replace(step, compiles=("x",)).missing([*rows, late]) == (50,)
    assert dataclasses.replace(step, compiles=("y",)).missing([*rows, late]) == (), "it is not asked for"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_planned_word_is_one_that_its_script_takes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for step in _plan.steps(device):
        script: Any = importlib.import_module(f"bench.{step.script}")
        options = script.parse([*step.words(step.lengths), "--device", device, "--budget-seconds", "1", "--out", "x"])
        assert options.device == device
        if step.lengths:
            assert options.seq_len == list(step.lengths)


def test_targets_are_ratios_of_a_runs_rows() -> None:
    shape = {"batch": 4096, "seq_len": 200}
    rows = [
        {"model": "m2rec", "impl": "triton", "mode": "folded graph", "median_ms": 2.0, "bound_share": 0.7,
         "bound": "special functions", "bound_ms": 1.4, **shape},
        {"model": "sasrec", "impl": "last query", "mode": "compiled", "median_ms": 2.5, **shape},
        {"model": "sasrec", "impl": "as published", "mode": "eager", "median_ms": 16.0, **shape},
    ]  # fmt: skip
    found = {(one.what, one.against): one for one in _targets.evaluate({"throughput": rows})}
    throughput = "throughput, L=200, B=4096"
    assert found[throughput, "SASRec at its best"].found == 1.25
    assert found[throughput, "SASRec at its best"].reached is False
    assert found[throughput, "SASRec, eager as published"].reached is True
    assert found[throughput, "its bound"].reached is True
    assert found["latency, L=200, B=1", "SASRec at its best"].reached is None
    table = _targets.table(list(found.values()))
    assert "| 1.25x | MISSED: triton folded graph 2 against last query compiled 2.5 |" in table
    assert table.count("not measured") == len(found) - 3


def test_the_peer_is_the_fastest_sasrec_and_had_its_chance() -> None:
    shape = {"batch": 1, "seq_len": 50, "dtype": "bfloat16"}
    ours = {"model": "m2rec", "impl": "triton", "mode": "folded graph", "median_ms": 2.0, **shape}
    peer = {"model": "sasrec", "impl": "last query", **shape}
    compiled = {**peer, "mode": "compiled", "median_ms": 3.0}
    graph = {**peer, "mode": "graph", "median_ms": 2.2}
    short = {**peer, "mode": _modes.NO_SEARCH, "median_ms": 2.5}
    other = {**graph, "dtype": "float32", "median_ms": 0.1}

    def of(*rows: dict[str, Any]) -> _targets.Result:
        return next(one for one in _targets.evaluate({"latency": [ours, *rows]}) if one.what == "latency, L=50, B=1")

    one = of(compiled, graph, other)
    assert (one.found, one.reached) == (1.1, True)
    assert one.detail == "triton folded graph 2 against last query graph 2.2"
    one = of(short, graph)
    assert one.reached is True
    assert one.detail.endswith("against last query graph 2.2; compiled without a search")
    one = of(graph)
    assert (one.found, one.reached) == (1.1, None), "not settled without its best chance"
    assert "| 1.10x | open: " in _targets.table([one])
    assert of({**graph, "median_ms": 1.0}).reached is False, "slower than any of its rows is missed"
    assert of({**graph, "median_ms": None}, other).found is None


def test_what_may_cost_at_most_so_much_is_said_so() -> None:
    row = {"dtype": "bfloat16", "batch": 2048, "seq_len": 200, "phase": "training", "mode": "eager", "median_ms": None}
    rows = [
        {**row, "model": "m2rec", "impl": "triton", "positions": "last", "peak_mem_mb": 100.0},
        {**row, "model": "sasrec", "impl": "last query", "positions": "last", "peak_mem_mb": 199.0},
        {**row, "model": "sasrec", "impl": "as published", "positions": "all", "peak_mem_mb": 150.0},
    ]
    (one,) = [one for one in _targets.evaluate({"memory": rows}) if one.what.startswith("peak memory")]
    assert one.reached is False
    assert "| at most 0.5x | 0.51x | MISSED" in _targets.table([one]), "never rounded to the side of the target"


def test_correctness_counts_and_says_what_did_not_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_a.py").write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    (tests / "test_b.py").write_text("import no_such_module\n")
    (tests / "test_c.py").write_text(
        "import time\ndef test_good(): pass\ndef test_slow():\n    open('begun', 'w')\n    time.sleep(60)\n"
    )
    monkeypatch.setattr(_correctness, "ON_CPU", tuple(f"tests/test_{name}.py" for name in "abc"))
    _clock(monkeypatch, _correctness, (tmp_path / "begun").exists)
    monkeypatch.setattr(_correctness, "MOST_AT_ONCE", 1)  # so that the others have ended by then
    result = _correctness.run(tmp_path, "cpu", os.environ, seconds=30)
    assert (result["passed"], result["failed"]) == (2, 1)
    assert result["failures"] == ["tests/test_a.py::test_bad"]
    assert result["unfinished"] == ["tests/test_c.py"]
    assert "no_such_module" in result["broken"]["tests/test_b.py"]
    assert "assert False" in result["files"]["tests/test_a.py"]["tail"]
    assert "test_slow" in result["files"]["tests/test_c.py"]["tail"]
    assert not _correctness.is_complete(result)
    text = _correctness.summary(result)
    assert "2 passed, 1 failed" in text
    assert "`tests/test_a.py::test_bad`" in text
    for name in ("b", "c"):
        (tests / f"test_{name}.py").write_text("def test_good(): pass\n")
    (tests / "test_a.py").write_text("open('begun again', 'w')\n")
    _clock(monkeypatch, _correctness, lambda: False)
    again = _correctness.run(tmp_path, "cpu", os.environ, seconds=30, before=result)
    assert _correctness.is_complete(again)
    assert not (tmp_path / "begun again").exists(), "a file that ran to its end is not run again"
    assert (again["passed"], again["failures"]) == (3, ["tests/test_a.py::test_bad"])


def test_the_gpus_tests_are_found(root: Path) -> None:
    found = _correctness.files(root, "cuda")
    assert "tests/test_selective_scan_kernel.py" in found
    assert found.index("tests/test_selective_scan_kernel.py") < found.index("tests/test_bench.py")


@pytest.mark.parametrize("script", [sanitize, counters])
def test_what_the_tools_found_is_in_the_summary(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their rows are of a device, as all are, and an error that a tool found does not stay in a file."""
    table = '"ID","Kernel Name","Metric Name","Metric Value"\n"0","a_kernel","Duration","7"\n'
    outcomes = iter([_child.Outcome(0, 1.0, table), _child.Outcome(sanitize.ERROR_CODE, 1.0, table)])
    monkeypatch.setattr(_child, "run", lambda *words: next(outcomes))
    monkeypatch.setattr(script.shutil, "which", lambda name: name)
    monkeypatch.setattr(_results, "device_name", lambda device: "Z")
    run = _run(tmp_path, device_type="cuda")
    name = script.__name__.rpartition(".")[2]
    part = run.out / f"{name}.part"
    tools = ["--tools", "memcheck"] if script is sanitize else []
    script.main(["--ops", "last_state", "gated_fusion", *tools, "--out", str(part)])
    run.header = {**run.header, **{key: json.loads(part.read_text())[key] for key in _merge.ORIGIN}}
    _merge.merge(run.out / f"{name}.json", json.loads(part.read_text()), name)
    summary = run.summary()
    if script is sanitize:
        assert "* sanitize: 2 rows, 1 of them not clean\n  * gated_fusion, memcheck: FOUND ERRORS" in summary
    else:
        assert "* counters: 2 rows, 0 of them not clean" in summary


def test_wheels_that_do_not_import_are_told_from_our_own_failure(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "selective_scan_cuda-1-py3-none-any.whl", "w") as file:
        file.writestr("selective_scan_cuda.py", "raise ImportError('undefined symbol: _Z3foo')\n")
        info = "selective_scan_cuda-1.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: selective_scan_cuda\nVersion: 1\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    environment = {**os.environ, "PYTHONPATH": str(run_all.ROOT)}
    same, note = run_all.with_wheels(wheels, environment, tmp_path / "site")
    assert same is environment
    assert note is not None
    assert "the wheels do not import, and are left out: ImportError: undefined symbol: _Z3foo" in note
    (wheels / "selective_scan_cuda-1-py3-none-any.whl").write_text("no zip")
    _, note = run_all.with_wheels(wheels, environment, tmp_path / "other")
    assert note is not None
    assert note.startswith("the wheels were not installed: ")


def test_our_own_import_that_fails_is_said(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    said = run_all.probe({**os.environ, "PYTHONPATH": str(tmp_path)}, "cpu")
    assert isinstance(said, str)
    assert "no torch here" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --budget-minutes"),
        (["--budget-minutes", "0"], "--budget-minutes: expected more than 0, got 0"),
        (["--budget-minutes", "1", "--out", "x", "--record"], "not allowed with argument --out"),
        (["--budget-minutes", "1", "--wheels", "/nowhere"], "expected a folder with .whl files, found none"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_all.parse(flags)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed(root: Path, tmp_path: Path) -> None:
    """The real scripts, from the shell: SIGKILL as soon as there is a row, then the same command again."""
    out = tmp_path / "out"
    command = [sys.executable, str(root / "bench" / "run_all.py"), "--device", "cpu", "--out", str(out)]
    process = subprocess.Popen([*command, "--budget-minutes", "5"], cwd=root, stdout=subprocess.DEVNULL)
    stop = time.monotonic() + 280
    before: list[dict[str, Any]] = []
    while not before and process.poll() is None and time.monotonic() < stop:
        time.sleep(0.5)
        found = _merge.read(out / "kernels.json")
        before = [row for row in found["rows"] if row["median_ms"]] if found is not None else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert before, "no row was written before the kill"
    done = subprocess.run(
        [*command, "--budget-minutes", "0.6"], cwd=root, capture_output=True, text=True, check=False, timeout=150
    )
    assert done.returncode == 0, done.stderr
    after = _merge.read(out / "kernels.json")
    assert after is not None
    assert all(row in after["rows"] for row in before), "what was measured before the kill is kept as it was"
    assert (out / "summary.md").read_text() in done.stdout
    assert "## Targets" in done.stdout
