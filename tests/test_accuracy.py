"""bench/accuracy.py: what a YAML unfolds to, runs that are made once and go on, records, verdicts, and the report."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from bench import _experiments, accuracy
from bench.experiments import claims, figures, tables, text_tables, verdicts
from bench.experiments.execute import OutOfTimeError, Store
from bench.experiments.plan import read
from fastm2rec.data import load_dataset, load_text_table, save_text_table
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


def test_a_prepared_data_set_makes_the_same_runs(tmp_path: Path) -> None:
    file = _write(tmp_path, TINY.replace("synthetic:", "table:"))
    rows = [f"u{i % 25},i{i * 7 % 20},{i}" for i in range(500)]
    raw, prepared = tmp_path / "raw" / "table", tmp_path / "prepared" / "table"
    raw.mkdir(parents=True)
    (raw / "log.csv").write_text("\n".join(["user,item,timestamp", *rows]))
    load_dataset("table", raw).dataset.save(prepared)
    found, again = (read(file, folder.parent, "cpu", 1).runs for folder in (raw, prepared))
    assert [run.config.data.dataset for run in (found[0], again[0])] == ["table", "prepared"]
    assert [run.key for run in again] == [run.key for run in found]
    assert [run.dataset for run in again] == [run.dataset for run in found]
    store = Store(tmp_path)
    assert store.inputs(again[0]).dataset.fingerprint() == store.inputs(found[0]).dataset.fingerprint()


TEXTS = """
question: Which text?
compare_to: folder's own
seeds: [0]
options: {max_len: 8, d_model: 8, d_state: 4, batch_size: 250, prefixes_per_user: 1, epochs: 1}
data: {synthetic: {}}
models:
  folder's own: {}
  permuted: {text: permuted}
"""


def _permuted(folder: Path) -> Path:
    out = folder / "text" / "synthetic" / "permuted.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    text_tables.make("permuted", load_dataset("synthetic", text="auto"), "{title}", "no model", 1, out)
    return out


def test_a_run_is_told_by_what_its_text_table_holds(tmp_path: Path) -> None:
    file = _write(tmp_path, TEXTS, "text")
    missing = "text.yaml: text: there is no .*/a/text/synthetic/permuted.safetensors; bench/experiments/text_tables.py"
    with pytest.raises(ValueError, match=missing):
        read(file, tables=tmp_path / "a" / "text")
    table = _permuted(tmp_path / "a")
    first, again = (read(file, tables=_permuted(tmp_path / work).parents[1]) for work in "ab")
    own, run = first.runs
    assert run.options["text"].startswith("permuted ")
    assert str(tmp_path) not in str(run.options), "no path of this machine"
    assert [one.key for one in again.runs] == [own.key, run.key], "another place, the same content"
    # The same name in another work folder, other content.
    other = tmp_path / "c" / "text" / "synthetic" / table.name
    other.parent.mkdir(parents=True)
    rows = load_text_table(table)
    save_text_table(other, rows._replace(embeddings=rows.embeddings.flip(0)))
    changed = read(file, tables=other.parents[1]).runs
    assert changed[0].key == own.key
    assert changed[1].key != run.key


def test_a_run_reads_the_table_that_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _write(tmp_path, TEXTS, "text")
    arguments = [str(file), "--work", str(tmp_path), "--threads", "1", "--device", "cpu"]
    assert accuracy.main(arguments) == 2
    assert "text_tables.py makes it" in capsys.readouterr().err
    _permuted(tmp_path)
    assert accuracy.main(arguments) == 0
    plan, store = read(file, device="cpu", threads=1, tables=tmp_path / "text"), Store(tmp_path)
    own, permuted = (store.inputs(run).text for run in plan.runs)
    assert own is not None
    assert permuted is not None
    assert not permuted.equal(own)
    assert sorted(permuted[1:].tolist()) == sorted(own[1:].tolist())
    record = json.loads((tmp_path / "records" / "text.json").read_text())
    assert record["runs"][1]["options"]["text"] == plan.runs[1].options["text"]
    dataset = store.inputs(plan.runs[0]).dataset
    assert record["data"] == {"synthetic": {"fingerprint": dataset.fingerprint(), **dataset.statistics()}}


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


def test_processes_share_a_work_folder(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each makes the models that it is given; a last command writes the record of all, which is that of one process."""
    command = [str(done / "main.yaml"), "--work", str(tmp_path), "--threads", "1", "--device", "cpu"]
    parts = (["GRU4Rec"], ["M2Rec (inner)", "Mamba4Rec"])
    for number, labels in enumerate(parts):
        assert accuracy.main([*command, "--only", *labels, "--out", str(tmp_path / "out" / str(number))]) == 0
    first = json.loads((tmp_path / "out" / "0" / "main.json").read_text())
    assert {row["label"] for row in first["runs"]} == {"GRU4Rec"}
    assert {row["label"] for row in first["missing"]} == {"M2Rec (inner)", "Mamba4Rec"}
    assert accuracy.main([*command, "--budget-minutes", "0"]) == 0
    together, alone = (
        json.loads((folder / "records" / "main.json").read_text()) for folder in (tmp_path, done / "work")
    )
    assert [(row["label"], row["seed"], row["test"]) for row in together["runs"]] == [
        (row["label"], row["seed"], row["test"]) for row in alone["runs"]
    ]
    assert together["missing"] == []
    assert accuracy.main([*command, "--only", "GPT"]) == 2
    assert "--only: no experiment here has GPT" in capsys.readouterr().err
    run = read(done / "main.yaml", device="cpu", threads=1).runs[0]
    (tmp_path / run.key / "record.json").unlink()
    folder = RunFolder(tmp_path / run.key / "run")
    folder.prepare(run.config, "last")
    try:
        assert accuracy.main([*command, "--only", run.label]) == 2
    finally:
        folder.release()
    assert "another process is training in this folder" in capsys.readouterr().err


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


def test_an_experiment_on_two_devices_has_two_sections_and_their_figures(done: Path, tmp_path: Path) -> None:
    """One that was made on one device alone has no need to say so in its title."""
    record = json.loads((done / "work" / "records" / "main.json").read_text())
    other = {**record, "device": "another CPU, 8 threads"}
    page = _experiments.render([record, other, {**other, "name": "gate"}], tmp_path)
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert f"## Main table ({record['device']})" in titles
    assert "## Main table (another CPU, 8 threads)" in titles
    assert "## Text and gate" in titles
    drawn = set(re.findall(r"\]\(([^)]+\.png)\)", page))
    assert {"main-another-cpu.png", "gate.png"} <= drawn
    assert len(drawn) == 3
    assert all((tmp_path / name).is_file() for name in drawn)


def _found(low: float, high: float, by_seed: list[float], theirs: float = 0.2) -> dict[str, Any]:
    """A comparison with a model that reached `theirs`."""
    mean = sum(by_seed) / len(by_seed)
    return {
        "difference": mean, "low": low, "high": high, "by_seed": dict(enumerate(by_seed)), "relative": mean / theirs,
        "relative_low": low / theirs, "relative_high": high / theirs,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "better", "published", "nothing"),
    [
        (_found(0.01, 0.02, [0.014, 0.015, 0.016]), "held", "held", "held"),
        (_found(0.01, 0.02, [0.015, 0.015]), "not settled", "not settled", "not settled"),
        # Student's interval over these seeds is 0.0133 +- 4.303 * 0.0058 / sqrt(3), and reaches below zero.
        (_found(0.01, 0.02, [0.01, 0.01, 0.02]), "not settled", "not settled", "held"),
        (_found(0.01, 0.02, [0.01, -0.03, 0.06]), "not settled", "not settled", "not settled"),
        (_found(0.001, 0.002, [0.0014, 0.0015, 0.0016]), "held", "not held", "held"),
        (_found(-0.009, 0.02, [0.004, 0.005, 0.006]), "not settled", "not settled", "held"),
        (_found(-0.011, 0.02, [0.004, 0.005, 0.006]), "not settled", "not settled", "not settled"),
        (_found(-0.02, -0.01, [-0.014, -0.015, -0.016]), "not held", "not held", "not held"),
        # A relative difference of 3 % at most by users, and of more by seeds.
        (_found(-0.002, 0.006, [-0.004, 0.002, 0.008]), "not settled", "not settled", "not settled"),
        (_found(-0.002, 0.002, [0.0, 0.0, 0.0]), "not settled", "not settled", "not settled"),
    ],
)
def test_verdicts_follow_the_rules(found: dict[str, Any], better: str, published: str, nothing: str) -> None:
    assert claims.ranks_better(found) == better
    assert claims.gains_as_published(found) == published
    assert claims.loses_nothing(found) == nothing


def test_intervals_over_seeds_are_student_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom, quantile in enumerate(claims.STUDENT, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-4)
    values = [0.1, 0.4, 0.2, 0.3]
    expected = stats.t.interval(0.95, 3, loc=0.25, scale=stats.sem(values))
    assert claims.over_seeds(_found(0.0, 1.0, values)) == pytest.approx(expected, rel=1e-3)


def test_verdicts_over_data_sets() -> None:
    assert claims.together(["held", "held"]) == "held"
    assert claims.together(["not held", "not held"]) == "not held"
    assert claims.together(["held", "not held"]) == "not settled"


def test_a_claim_without_an_interval_needs_every_case_of_enough_seeds() -> None:
    assert claims.everywhere([True] * 6, 3) == "held"
    assert claims.everywhere([False] * 6, 3) == "not held"
    assert claims.everywhere([True, True, False], 3) == "not settled"
    assert claims.everywhere([True] * 6, 2) == claims.everywhere([False] * 6, 2) == "not settled"


def test_the_setting_is_chosen_on_validation_alone() -> None:
    def row(label: str, valid: float, test: float) -> dict[str, Any]:
        return {"dataset": "d", "label": label, "valid": {"NDCG@10": valid}, "test": {"NDCG@10": test}}

    rows = [row("a", 0.3, 0.9), row("a", 0.1, 0.9), row("b", 0.25, 0.1), row("b", 0.25, 0.1), row("c", 0.9, 0.9)]
    chosen = claims.chosen_on_validation({"runs": rows}, ["a", "b", "c"])
    assert chosen == [claims.Choice("d", "b", among=2, all=3, seeds=2)], "c has one seed only"


@pytest.mark.parametrize(
    ("name", "beginning"),
    [("settings", ""), ("long_settings", "Trained until validation stops rising: ")],
)
def test_what_wins_a_loss_back_is_said_where_there_is_one(name: str, beginning: str) -> None:
    def run(dataset: str, label: str, valid: float) -> dict[str, Any]:
        return {"dataset": dataset, "label": label, "valid": {"NDCG@10": valid}}

    def compared(dataset: str, label: str, difference: float) -> dict[str, Any]:
        found = _found(difference - 0.004, difference + 0.004, [difference] * 3)
        return {**found, "dataset": dataset, "label": label, "metric": "NDCG@10", "split": "test", "users": 9}

    described, ours, base = "M2Rec (inner)", "residual gate", "Mamba4Rec"
    record = {
        "name": name, "compare_to": base, "analysis": {},
        "runs": [run(dataset, label, valid) for dataset in "lw" for label, valid in
                 ((base, 0.9), (described, 0.1), (ours, 0.2))],
        "comparisons": [compared("l", described, -0.2), compared("l", ours, 0.001), compared("w", described, 0.2),
                        compared("w", ours, 0.3)],
    }  # fmt: skip
    (first, everywhere), (second, won_back) = verdicts.findings(record)
    assert first == beginning + "The setting of M2Rec that validation chooses ranks better than Mamba4Rec."
    assert second.startswith(beginning + "Where M2Rec (inner) is worse than Mamba4Rec, ")
    assert [(one.dataset, one.verdict) for one in everywhere] == [("l", "not settled"), ("w", "held")]
    assert all("chosen among the 2 of 2 settings" in one.evidence for one in everywhere)
    assert [(one.dataset, one.verdict) for one in won_back] == [("l", "held")]
    assert won_back[0].evidence.index("-0.2000") < won_back[0].evidence.index("+0.0010")


def test_claims_of_longer_sequences_say_how_long() -> None:
    row = {**_found(0.01, 0.02, [0.014, 0.015, 0.016]), "dataset": "d", "metric": "HR@10", "split": "test", "users": 9}
    record = {
        "name": "length", "compare_to": "Mamba4Rec", "analysis": {}, "runs": [{"options": {"max_len": 123}}],
        "comparisons": [{**row, "label": "M2Rec (inner)"}],
    }  # fmt: skip
    ((claim, (finding,)),) = verdicts.findings(record)
    assert claim == (
        "With 123 positions, trained until validation stops rising, M2Rec (inner) ranks better than Mamba4Rec."
    )
    assert finding.verdict == "held"


def test_text_is_said_to_matter_where_permuted_rows_are_worse() -> None:
    found = _found(-0.02, -0.01, [-0.014, -0.015, -0.016], theirs=0.1)
    row = {**found, "dataset": "d", "label": "MiniLM, rows permuted", "metric": "NDCG@10", "split": "test", "users": 9}
    record = {"name": "text", "compare_to": "MiniLM", "analysis": {}, "comparisons": [row]}
    ((claim, (finding,)),) = verdicts.findings(record)
    assert claim.startswith("MiniLM ranks better than the same table with its rows permuted")
    assert finding.verdict == "held"
    # 0.015 -+ 4.303 * 0.001 / sqrt(3); and 1 / 0.85, 1 / 0.9 and 1 / 0.8, less 1
    assert finding.evidence == (
        "NDCG@10 +0.0150 [+0.0100, +0.0200] over users and [+0.0125, +0.0175] over seeds, "
        "relative +17.6% [+11.1%, +25.0%]; 3 seeds, 9 users"
    )


@pytest.mark.parametrize(
    ("seeds", "losses", "verdict", "smaller"),
    [
        (3, [0.1, 0.2, 0.3], "held", "3 of 3"),
        (3, [0.1, 0.2, 0.5], "not settled", "2 of 3"),
        (3, [0.5, 0.5, 0.5], "not held", "0 of 3"),
        (2, [0.1, 0.2], "not settled", "2 of 2"),
    ],
)
def test_robustness_is_claimed_by_every_seed(seeds: int, losses: list[float], verdict: str, smaller: str) -> None:
    def rows(label: str, clean: float, lost: list[float]) -> list[dict[str, Any]]:
        at = {"dataset": "d", "label": label}
        noisy = [
            {**at, "noise": "replaced", "share": 0.1, "seed": s, "NDCG@10": clean * (1 - x)} for s, x in enumerate(lost)
        ]
        return noisy + [{**at, "noise": "none", "share": 0.0, "seed": s, "NDCG@10": clean} for s in range(len(lost))]

    analysis = {"kind": "noise", "rows": rows("M2Rec (inner)", 0.2, losses) + rows("Mamba4Rec", 0.6, [0.4] * seeds)}
    ((_, (finding,)),) = verdicts.findings({"compare_to": "Mamba4Rec", "analysis": analysis})
    assert (finding.verdict, finding.evidence) == (
        verdict, f"the smaller loss in {smaller} pairs of noise and seed; {seeds} seeds",
    )  # fmt: skip
    shown = tables.noise(analysis)
    assert f"| d | M2Rec (inner) | {seeds} | 0.2000 | {0.2 * (1 - sum(losses) / seeds):.4f} " in shown


def test_the_origin_of_every_run_is_said() -> None:
    def row(commit: str, created: str, **more: str) -> dict[str, Any]:
        return {"commit": commit, "created": created, "torch": "2", **more}

    record: dict[str, Any] = {"device": "here", "commit": "c", "analysis": {}, "runs": [row("a", "3"), row("a", "4")]}
    assert tables.origins(record) == "here; torch 2; commit a."
    record["runs"].insert(0, row("b", "1"))
    assert tables.origins(record) == "here; torch 2; commits b (1 run), a (2 runs)."
    record["runs"].append(row("a", "5", device="there"))
    record["analysis"] = {"kind": "noise"}
    assert tables.origins(record) == (
        "here; torch 2; commits b (1 run), a (2 runs). there; torch 2; commit a (1 run). Analysed at commit c."
    )


@pytest.mark.parametrize(("panels", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (4, (2, 2))])
def test_a_figure_is_at_most_two_panels_wide(panels: int, shape: tuple[int, int]) -> None:
    pytest.importorskip("matplotlib")
    figure, made = figures._figure(panels, width=5.0, height=2.0)
    assert figure.get_axes() == made
    assert len(made) == panels
    assert made[-1].get_gridspec().get_geometry() == shape
    assert tuple(figure.get_size_inches()) == (max(6.0, 5.0 * shape[1]), 2.0 * shape[0])


def test_the_report_says_what_the_records_say(done: Path, tmp_path: Path) -> None:
    record = json.loads((done / "work" / "records" / "main.json").read_text())
    record["missing"] = [{"label": "SASRec", "dataset": "synthetic", "seed": 0}]
    text = _experiments.render([{"kind": "latency"}, record], tmp_path)
    assert f"| {record['runs'][-1]['test']['HR@10']:.4f} |" in text
    assert "Not run, for want of time: SASRec." in text
    facts = record["data"]["synthetic"]
    assert f"| synthetic | {facts['users']} | {facts['items']} | {facts['events']:,} |" in text
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
        ("ties", "{kind: ties, users: {synthetic: 9}}"),
    ):
        file = _write(tmp_path, TINY + f"analysis: {analysis}", name)
        arguments = ["--work", str(done / "work"), "--out", str(tmp_path), "--threads", "1", "--budget-minutes", "0"]
        assert accuracy.main([str(file), "--device", "cpu", *arguments]) == 0
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    text = _experiments.render(records, tmp_path)
    assert "**The slowest peak in the spectrum of a cycle is at 1 / period.** Held." in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"spectrum.png", "dynamics.png"}
    split = next(record for record in records if record["name"] == "ties")["analysis"]["rows"]
    assert {row["group"] for row in split} == {"that of the one before", "later", "below 9", "from 9 on"}
    assert {row["users"] for row in split if row["group"] == "that of the one before"} == {0}  # a step is a second
    clean = {
        row["label"]: row["NDCG@10"]
        for record in records
        if record["name"] == "noise"
        for row in record["analysis"]["rows"]
        if row["noise"] == "none"
    }
    assert clean["GRU4Rec"] == next(r for r in records[0]["runs"] if r["label"] == "GRU4Rec")["test"]["NDCG@10"]
