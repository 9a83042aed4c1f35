"""bench/accuracy.py: what a YAML unfolds to, runs that are made once and go on, records, verdicts, and the report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from bench import _experiments, accuracy
from bench.experiments import claims
from bench.experiments.execute import OutOfTimeError, Store
from bench.experiments.plan import read
from fastm2rec.training import RunFolder, evaluate

TINY = """
question: Does it run?
compare_to: Mamba4Rec
seeds: [0, 1]
options: {max_len: 8, d_model: 8, batch_size: 250, prefixes_per_user: 1, epochs: 2}
data:
  synthetic: {dropout: 0.0}
models:
  Mamba4Rec: {model: mamba4rec, d_state: 4}
  M2Rec (inner): {model: m2rec, d_state: 4, gate: none}
  GRU4Rec: {model: gru4rec, gru_width: 8, seeds: [1], for: {synthetic: {epochs: 1}}}
"""


def _write(path: Path, text: str = TINY, name: str = "main") -> Path:
    file = path / f"{name}.yaml"
    file.write_text(text)
    return file


def test_a_yaml_unfolds_to_runs_by_seed(tmp_path: Path) -> None:
    plan = read(_write(tmp_path), device="cpu", threads=1)
    assert [(run.seed, run.label) for run in plan.runs] == [
        (0, "Mamba4Rec"), (0, "M2Rec (inner)"), (1, "Mamba4Rec"), (1, "M2Rec (inner)"), (1, "GRU4Rec"),
    ]  # fmt: skip
    options = plan.runs[-1].config.to_dict()
    assert (options["epochs"], options["dropout"], options["seed"], options["threads"]) == (1, 0.0, 1, 1)
    # The digest is of what the result depends on: not of where the data lies, nor of the label.
    other = read(_write(tmp_path, TINY.replace("Mamba4Rec", "other"), "b"), tmp_path / "data", device="auto")
    assert [run.key for run in other.runs] == [run.key for run in plan.runs]
    assert len({run.key for run in plan.runs}) == 5
    left_out = read(_write(tmp_path, TINY.replace("for: {synthetic: {epochs: 1}}", "for: {synthetic: null}"), "c"))
    assert {run.label for run in left_out.runs} == {"Mamba4Rec", "M2Rec (inner)"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TINY.replace("seeds: [0, 1]", "sedes: [0]"), "sedes: no key of an experiment; it has analysis, compare_to"),
        (
            TINY.replace("compare_to: M", "compare_to: m"),
            "compare_to: expected one of Mamba4Rec, M2Rec .inner., GRU4Rec",
        ),
        (TINY.replace("question", "# question"), "there is no 'question'"),
        (TINY.replace("d_state: 4}", "d_states: 4}"), "d_states: no option of a run with model=mamba4rec"),
        (TINY + "analysis: {kind: nose}", "analysis: kind: expected one of noise, cold_start, .*, got 'nose'"),
        ("- 1", "expected a mapping, got list"),
    ],
)
def test_a_wrong_yaml_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"main.yaml: {message}"):
        read(_write(tmp_path, text))


def test_every_experiment_of_the_project_can_be_read(root: Path) -> None:
    files = sorted((root / "bench" / "experiments").glob("*.yaml"))
    assert {path.stem for path in files} == set(_experiments.ORDER)
    for path in files:
        plan = read(path, Path("data"))
        assert plan.runs, path
        assert len({(run.label, run.dataset, run.seed) for run in plan.runs}) == len(plan.runs), path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of TINY, made by the command."""
    folder = tmp_path_factory.mktemp("accuracy")
    file = _write(folder)
    assert accuracy.main([str(file), "--work", str(folder / "work"), "--threads", "1", "--device", "cpu"]) == 0
    return folder


def test_runs_are_recorded_and_made_once(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = done / "work" / "records" / "main.json"
    record = json.loads(path.read_text())
    assert len(record["runs"]) == 5
    assert record["missing"] == []
    assert all(row["options"].get("data") is None for row in record["runs"]), "no path of this machine"
    plan, store = read(done / "main.yaml", device="cpu", threads=1), Store(done / "work")
    for run, row in zip(plan.runs, record["runs"], strict=True):
        dataset = store.inputs(run).dataset
        assert row["test"] == evaluate(store.model(run), dataset, "test").compute()
        assert row["valid"]["NDCG@10"] == max(line["valid"]["NDCG@10"] for line in store.history(run))
    ours, theirs = (
        [row["test"]["HR@10"] for row in record["runs"] if row["label"] == label]
        for label in ("M2Rec (inner)", "Mamba4Rec")
    )
    found = next(claims.comparisons(record, "M2Rec (inner)", "HR@10"))
    assert found["by_seed"] == {str(seed): pytest.approx(ours[seed] - theirs[seed]) for seed in (0, 1)}
    assert next(claims.comparisons(record, "GRU4Rec", "HR@10"))["by_seed"].keys() == {"1"}

    before = {
        file: file.stat().st_mtime_ns
        for file in (done / "work").rglob("*")
        if file.is_file() and file.name != "main.json"
    }
    capsys.readouterr()
    arguments = ["--work", str(done / "work"), "--threads", "1", "--device", "cpu", "--budget-minutes", "0"]
    assert accuracy.main([str(done / "main.yaml"), *arguments]) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert "GRU4Rec" in capsys.readouterr().out


def test_a_run_out_of_time_goes_on_to_the_same_end(done: Path, tmp_path: Path) -> None:
    run = read(done / "main.yaml", device="cpu", threads=1).runs[1]
    store = Store(tmp_path)
    with pytest.raises(OutOfTimeError):
        store.make(run, time.monotonic() - 1, lambda line: None)
    assert store.record(run) is None
    assert len(RunFolder(tmp_path / run.key / "run").metrics()) == 1, "stopped after its first evaluation"
    record = store.make(run, time.monotonic() + 600, lambda line: None)
    straight = Store(done / "work").record(run)
    assert straight is not None
    assert (record["valid"], record["test"], record["epochs"]) == (straight["valid"], straight["test"], 2)


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _write(tmp_path)
    assert (
        accuracy.main([str(file), "--work", str(tmp_path), "--out", str(tmp_path / "out"), "--budget-minutes", "0"])
        == 0
    )
    assert capsys.readouterr().out.count("not run yet: synthetic, ") == 5
    assert json.loads((tmp_path / "out" / "main.json").read_text())["runs"] == []
    assert accuracy.main([str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        accuracy.main([])
    assert "expected an experiment's YAML file, or --report" in capsys.readouterr().err


def _found(low: float, high: float, by_seed: list[float], relative: tuple[float, float] = (0.0, 0.0)) -> dict[str, Any]:
    return {
        "low": low, "high": high, "by_seed": dict(enumerate(by_seed)), "relative_low": relative[0],
        "relative_high": relative[1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "better", "published", "nothing"),
    [
        (_found(0.01, 0.02, [0.01, 0.01, 0.02], (0.05, 0.1)), "held", "held", "held"),
        (_found(0.01, 0.02, [0.01, 0.01], (0.05, 0.1)), "not settled", "not settled", "not settled"),
        (_found(0.01, 0.02, [0.01, -0.01, 0.04], (0.05, 0.1)), "not settled", "not settled", "held"),
        (_found(0.001, 0.002, [0.001, 0.001, 0.002], (0.01, 0.02)), "held", "not held", "held"),
        (_found(-0.01, 0.02, [0.01, -0.01, 0.02], (-0.04, 0.1)), "not settled", "not settled", "held"),
        (_found(-0.02, -0.01, [-0.01, -0.01, -0.02], (-0.04, -0.01)), "not held", "not held", "not held"),
        (_found(-0.02, 0.02, [-0.01, 0.01, 0.0], (-0.2, 0.2)), "not settled", "not settled", "not settled"),
    ],
)
def test_verdicts_follow_the_rules(found: dict[str, Any], better: str, published: str, nothing: str) -> None:
    assert claims.ranks_better(found) == better
    assert claims.gains_as_published(found) == published
    assert claims.loses_nothing(found) == nothing


def test_verdicts_over_data_sets() -> None:
    assert claims.together(["held", "held"]) == "held"
    assert claims.together(["not held", "not held"]) == "not held"
    assert claims.together(["held", "not held"]) == "not settled"


def test_the_setting_is_chosen_on_validation_alone() -> None:
    def row(label: str, valid: float, test: float) -> dict[str, Any]:
        return {"dataset": "d", "label": label, "valid": {"NDCG@10": valid}, "test": {"NDCG@10": test}}

    rows = [row("a", 0.3, 0.9), row("a", 0.1, 0.9), row("b", 0.25, 0.1), row("b", 0.25, 0.1), row("c", 0.9, 0.9)]
    assert claims.chosen_on_validation({"runs": rows}, ["a", "b", "c"]) == [("d", "b")], "c has one seed only"


def test_the_report_says_what_the_records_say(done: Path, tmp_path: Path) -> None:
    record = json.loads((done / "work" / "records" / "main.json").read_text())
    record["missing"] = [{"label": "SASRec", "dataset": "synthetic", "seed": 0}]
    text = _experiments.render([{"kind": "latency"}, record], tmp_path)
    assert f"| {record['runs'][-1]['test']['HR@10']:.4f} |" in text
    assert "Not run, for want of time: SASRec." in text
    assert "**M2Rec (inner) ranks better than Mamba4Rec.** Not settled." in text
    assert (tmp_path / "main.png").read_bytes().startswith(b"\x89PNG")
    assert "python bench/accuracy.py bench/experiments/main.yaml" in text
    with pytest.raises(ValueError, match="^records: expected at least one experiment"):
        _experiments.render([{"kind": "latency"}], tmp_path)


def test_analyses_run_on_trained_models_and_are_reported(done: Path, tmp_path: Path) -> None:
    for name, analysis in (
        ("noise", "{kind: noise, gaussian: [0.2], replaced: [0.5]}"),
        ("cold_start", "{kind: cold_start, history: [5, 60], events: [0, 5]}"),
        ("spectrum", "{kind: spectrum, length: 8, cycle: 7}"),
        ("dynamics", "{kind: dynamics}"),
    ):
        file = _write(tmp_path, TINY + f"analysis: {analysis}", name)
        arguments = ["--work", str(done / "work"), "--out", str(tmp_path), "--threads", "1", "--budget-minutes", "0"]
        assert accuracy.main([str(file), "--device", "cpu", *arguments]) == 0
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    text = _experiments.render(records, tmp_path)
    assert "**The slowest peak in the spectrum of a cycle is at 1 / period.** Held." in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"spectrum.png", "dynamics.png"}
    clean = {
        row["label"]: row["NDCG@10"]
        for record in records
        if record["name"] == "noise"
        for row in record["analysis"]["rows"]
        if row["noise"] == "none"
    }
    assert clean["GRU4Rec"] == next(r for r in records[0]["runs"] if r["label"] == "GRU4Rec")["test"]["NDCG@10"]
