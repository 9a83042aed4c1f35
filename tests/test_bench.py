"""The latency benchmark: what it measures is checked first, what cannot run says why, and its record is complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import _bounds, _plot, _registry, _results, _timing, latency

SIZES = _registry.Sizes(n_items=50, d_state=4, topk=5, dtype=torch.float32, device=torch.device("cpu"))
FLAGS = ["--seq-len", "7", "--batch", "1", "3", "--d-state", "4", "--n-items", "50", "--topk", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def eager_cases() -> list[_registry.Case]:
    return [case for case in _registry.cases(_registry.MODELS, 7, SIZES) if case.mode == "eager"]


def test_every_model_and_peer_has_a_row(eager_cases: list[_registry.Case]) -> None:
    rows = {(case.model, case.impl) for case in eager_cases}
    for model in ("sasrec", "bert4rec"):
        assert {(model, "as published"), (model, "last query")} <= rows
    assert {("m2rec", "reference"), ("m2rec", "torch.fft + loop"), ("mamba4rec", "reference")} <= rows
    for other in ("triton", "cpu", "mamba_ssm"):
        assert ("m2rec", other) in rows, "what is missing is listed, not left out"


@torch.inference_mode()
def test_what_runs_is_right_and_what_does_not_says_why(eager_cases: list[_registry.Case]) -> None:
    (inputs, *_) = latency.batches(3, 7, SIZES)
    for case in eager_cases:
        if case.skipped is not None:
            assert len(case.skipped) > 10
            continue
        assert latency.error_of(case, inputs) < latency.TOLERANCE[torch.float32]
        scores, ids = case.top(5)(*inputs)
        assert case.encode is not None
        assert case.table is not None
        everything = case.encode(*inputs) @ case.table.t()
        everything[:, 0] = -torch.inf
        assert torch.equal(ids, everything.topk(5).indices)
        # A product with one column less may sum in another order: a few roundings of the largest score.
        torch.testing.assert_close(scores, everything.gather(1, ids), rtol=0, atol=4e-7 * float(scores.abs().max()))


@torch.inference_mode()
def test_a_wrong_implementation_gets_no_time(eager_cases: list[_registry.Case]) -> None:
    good = next(case for case in eager_cases if case.impl == "reference")
    assert good.encode is not None
    encode = good.encode
    bad = _registry.Case("m2rec", "bad", "eager", good.config, lambda *x: encode(*x) * 1.01, good.check, good.table)

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    failing = _registry.Case("m2rec", "failing", "eager", good.config, broken, good.check, good.table)
    ceilings = _bounds.Ceilings(1e9, 1e9, 1e9)
    rows = latency.measure([good, bad, failing], 3, 7, SIZES, ceilings, seconds=0.0, stop=float("inf"))
    assert rows[0].median_ms is not None
    assert rows[0].skipped is None
    assert rows[1].median_ms is None
    assert rows[1].skipped is not None
    assert rows[1].skipped.startswith("wrong: differs from its reference by 1")
    assert rows[2].skipped == "RuntimeError: no such kernel"


def test_a_run_from_the_shell(root: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    done = subprocess.run(
        [sys.executable, "bench/latency.py", *FLAGS, "--eager-only", "--budget-seconds", "0",
         "--out", str(out), "--plot", str(plot)],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
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
        assert row["max_rel_err"] < 1e-4
    assert "x SASRec" in done.stdout
    assert "skipped: " in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_compiled_rows() -> None:
    flags = ["--seq-len", "7", "--batch", "2", "--d-state", "4", "--n-items", "50", "--device", "cpu"]
    options = latency.parse([*flags, "--models", "sasrec", "--budget-seconds", "600"])
    rows = [row for row in latency.run(options) if row.mode == "compiled"]
    reason = _registry.cannot_compile(torch.device("cpu"))
    assert len(rows) == 1
    assert all((row.median_ms is not None) == (reason is None) for row in rows), [row.skipped for row in rows]


def test_the_table_compares_with_the_fastest_sasrec_of_the_same_shape() -> None:
    def row(model: str, mode: str, batch: int, ms: float | None) -> _results.Row:
        made = _results.Row(model, "x", mode, "float32", batch, 7, 4, 50, skipped=None if ms else "no reason")
        made.median_ms = made.p20_ms = made.p80_ms = ms
        made.sequences_per_s = batch / ms if ms else None
        return made

    rows = [row("m2rec", "eager", 1, 3.0), row("sasrec", "eager", 1, 6.0), row("sasrec", "compiled", 1, 4.0)]
    rows += [row("sasrec", "eager", 9, 1.0), row("m2rec", "compiled", 1, None)]
    assert _results.best_peer(rows, rows[0]) == 4.0
    lines = _results.table(rows).splitlines()
    assert "0.75" in lines[2]
    assert lines[-1] == "skipped: no reason: m2rec x compiled"


def test_quantiles_of_samples() -> None:
    timing = _timing.summarise([0.001 * i for i in range(1, 12)])
    assert (timing.median_ms, timing.p20_ms, timing.p80_ms) == pytest.approx((6.0, 3.0, 9.0))
    assert timing.samples == 11


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_timing, "CPU_SAMPLE_SECONDS", 0.0)  # one call a sample
    seen: list[str] = []
    calls = [lambda turn: seen.append("a"), lambda turn: seen.append("b")]
    _timing.interleave(calls, torch.device("cpu"), seconds=0.0, least=3, most=50)
    assert "".join(seen[-6:]) == "ababab"
    assert seen[:-6].count("a") == seen[:-6].count("b") == 3, "each is warmed up"


def test_the_bound_is_the_slowest_resource() -> None:
    ceilings = _bounds.Ceilings(special=10.0, operations=100.0, bytes=1000.0)
    assert ceilings.bound(_bounds.Work(special=20, operations=100, bytes=100)) == ("special functions", 2000.0)
    assert ceilings.bound(_bounds.Work(special=1, operations=100, bytes=5000)) == ("memory", 5000.0)


def test_no_figure_without_a_measured_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least one measured row"):
        _plot.latency(tmp_path / "x.png", [], "")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq-len", "0"], "expected a whole number of at least 1, got '0'"),
        (["--topk", "99", "--n-items", "50"], "--topk: expected at most --n-items=50, got 99"),
        (["--models", "gpt"], "invalid choice: 'gpt'"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        latency.parse(flags)
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    latency.main(["--seq-len", "50", "--batch", "32", "--dtype", "bfloat16", "--eager-only", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert any(row["model"] == "m2rec" and row["median_ms"] for row in rows)
    assert all(row["peak_mem_mb"] for row in rows if row["median_ms"])
