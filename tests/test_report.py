"""The README's results are the records', to the letter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import _axes, _plot, _results, report
from bench import scaling as script
from bench._sections import _record, models, scaling, targets

HEAD = {"schema": 1, "torch": "2.13.0", "triton": "3.7.1", "python": "3.11", "kernels_tree": "abcdef", "commit": "x"}
HEAD |= {"created": "2026-01-02T03:04:05+00:00"}


def test_the_readme_says_what_the_records_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_every_figure_of_the_readme_exists(root: Path) -> None:
    block = (root / "README.md").read_text().partition(report.BEGIN)[2].partition(report.END)[0]
    for name in re.findall(r"\]\((docs/[^)]+)\)", block):
        assert (root / name).exists(), name


def _latency(model: str, impl: str, ms: float) -> dict[str, Any]:
    return {
        "model": model, "impl": impl, "mode": "eager", "dtype": "float32", "batch": 1, "seq_len": 50, "d_state": 16,
        "n_items": 3706, "median_ms": ms, "p20_ms": ms, "p80_ms": 2 * ms,
    }  # fmt: skip


def _kernel(impl: str, ms: float) -> dict[str, Any]:
    return {
        "op": "last_state", "phase": "forward", "impl": impl, "mode": "eager", "dtype": "bfloat16", "batch": 2048,
        "seq_len": 200, "d_state": 16, "median_ms": ms, "p20_ms": ms, "p80_ms": ms, "bound": "special functions",
        "bound_ms": 0.5, "bound_share": 0.5 / ms,
    }  # fmt: skip


def _at(length: int, batch: int, items: int, *, m2rec: float | None, sasrec: float | None) -> list[dict[str, Any]]:
    """The rows of both models at one shape; None where one was skipped."""
    sizes = {"seq_len": length, "batch": batch, "n_items": items}
    rows = [_latency("m2rec", "cpu", m2rec or 0) | sizes, _latency("sasrec", "last query", sasrec or 0) | sizes]
    for row in rows:
        if not row["median_ms"]:
            row |= {"median_ms": None, "p20_ms": None, "p80_ms": None, "skipped": "MemoryError: too large"}
    return rows


def _star() -> list[dict[str, Any]]:
    """Axes that meet at length 200, batch 4, 3,706 items; every shape has another SASRec time."""
    return [
        *_at(200, 4, 3706, m2rec=1.0, sasrec=2.0),
        *_at(800, 4, 3706, m2rec=None, sasrec=8.0),
        *_at(200, 1, 3706, m2rec=1.5, sasrec=1.0),
        *_at(200, 4, 100_000, m2rec=5.0, sasrec=4.0),
        *_at(50, 4, 3706, m2rec=0.3, sasrec=0.4),
        *_at(8192, 4, 3706, m2rec=None, sasrec=None),
    ]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a README and one record of each kind, on two devices."""

    def write(folder: str, script: str, device: str, kind: str, rows: list[dict[str, Any]]) -> None:
        path = tmp_path / "bench" / "results" / folder / f"{script}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**HEAD, "device": device, "device_type": kind, "rows": rows}))

    write(
        "cpu-x",
        "latency",
        "X, 2 threads",
        "cpu",
        [_latency("m2rec", "cpu", 3.0), _latency("sasrec", "last query", 2.0)],
    )
    write("gpu", "kernels", "Some GPU", "cuda", [_kernel("triton", 0.7), _kernel("triton, all positions", 1.75)])
    write("cpu-x", "scaling", "X, 2 threads", "cpu", _star())
    metrics = {"HR@10": 0.1234567, "NDCG@10": 0.05, "MRR@10": 0.03}
    write("cpu-x", "accuracy-ml-100k", "X", "cpu", [{"run": "sasrec", "command": "fastm2rec train", **metrics}])
    (tmp_path / "README.md").write_text(f"# x\n\n{report.BEGIN}\nold 47\n{report.END}\n\n## y\n")
    return tmp_path


def test_the_block_is_replaced_and_nothing_else(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"], project) == 1
    assert "-old 47" in capsys.readouterr().out
    assert (project / "README.md").read_text().count("old 47") == 1, "--check writes nothing"
    assert report.main([], project) == 0
    text = (project / "README.md").read_text()
    assert text.startswith(f"# x\n\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\n\n## y\n")
    assert "old 47" not in text
    assert report.main(["--check"], project) == 0
    for figure in ("latency-cpu-x.png", "roofline-gpu.png", "scaling-cpu-x.png"):
        assert (project / "docs" / figure).read_bytes().startswith(b"\x89PNG")
    (project / "docs" / "latency-cpu-x.png").unlink()
    assert report.main(["--check"], project) == 1


def test_numbers_are_the_records(project: Path) -> None:
    report.main([], project)
    text = (project / "README.md").read_text()
    assert "| m2rec | cpu | 1.50 |" in text, "3 ms over SASRec's 2"
    assert "2.00 times the 20 % quantile in the median row" in text
    assert "| sasrec | 0.1235 | 0.0500 | 0.0300 |" in text
    assert "| last_state (triton), L=200, B=2048 | own selective_scan | at least 2x | 2.50x | reached" in text
    assert "Some GPU, torch 2.13.0, Triton 3.7.1, 2026-01-02, kernels abcdef (`bench/results/gpu/kernels.json`)" in text
    assert text.index("**Latency**") < text.index("**Scaling**") < text.index("**MovieLens 100K**")
    changed = project / "bench" / "results" / "cpu-x" / "latency.json"
    changed.write_text(changed.read_text().replace("3.0", "3.1"))
    assert report.main(["--check"], project) == 1, "a record that changed shows"


def test_without_a_gpu_record_it_says_so(project: Path) -> None:
    records = [record for record in _record.read(project) if not record.is_gpu]
    assert targets.render(records, project).startswith("**No GPU time is recorded yet.**")


def test_each_is_shown_in_its_best_mode_and_dtype(project: Path) -> None:
    rows = [_latency("sasrec", "last query", 2.0), _latency("m2rec", "cpu", 3.0)]
    rows += [_latency("m2rec", "cpu", 1.0) | {"mode": "folded", "dtype": "bfloat16"}]
    rows += [_latency("sasrec", "last query", 2.5) | {"dtype": "bfloat16"}]
    record = _record.Record("bench/results/cpu-x/throughput.json", {**HEAD, "device": "X", "device_type": "cpu"}, rows)
    text = models.render([record], project / "docs")
    assert "| m2rec | cpu | 0.50 folded bf16 |" in text
    assert "| sasrec | last query | 1.00 |" in text
    assert text.startswith("**Throughput**: ids in, top 10 of 3,706 items out")


def _scaling(rows: list[dict[str, Any]]) -> _record.Record:
    return _record.Record("bench/results/cpu-x/scaling.json", {**HEAD, "device": "X", "device_type": "cpu"}, rows)


Panels = list[tuple[str, str, list[_results.Row]]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Panels:
    """The panels of the last figure, which is not drawn."""
    found: Panels = []
    monkeypatch.setattr(_plot, "grid", lambda path, panels, y, title: found.__setitem__(slice(None), panels))
    return found


@pytest.mark.parametrize("order", [1, -1])
def test_one_size_grows_at_a_time(order: int, drawn: Panels, tmp_path: Path) -> None:
    text = scaling.render([_scaling(_star()[::order])], tmp_path)
    header, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert header == "| model | computed by | L=200, batch 4, 3,706 items | L=50 | L=800 | batch 1 | 100,000 items |"
    assert sorted(lines) == [
        "| m2rec | cpu | 0.50 | 0.75 |  | 1.50 | 1.25 |",
        "| sasrec | last query | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |",
    ]
    assert "has the others at length 200, batch 4, 3,706 items." in " ".join(text.split())
    assert text.endswith("(docs/scaling-cpu-x.png)")
    points = {(x, name): sorted(getattr(row, x) for row in own if row.model == "sasrec") for x, name, own in drawn}
    assert points == {
        ("seq_len", "batch 4, 3,706 items"): [50, 200, 800],
        ("batch", "length 200, 3,706 items"): [1, 4],
        ("n_items", "length 200, batch 4"): [3706, 100_000],
    }


def test_scaling_draws_what_grew(drawn: Panels, tmp_path: Path) -> None:
    rows = [*_at(200, 4, 3706, m2rec=1.0, sasrec=2.0), *_at(200, 8, 3706, m2rec=1.0, sasrec=4.0)]
    assert "| model | computed by | L=200, batch 4, 3,706 items | batch 8 |" in scaling.render(
        [_scaling(rows)], tmp_path
    )
    assert [x for x, _, _ in drawn] == ["batch"]


def test_scaling_without_a_time_says_nothing(tmp_path: Path) -> None:
    assert scaling.render([_scaling(_at(200, 4, 3706, m2rec=None, sasrec=None))], tmp_path) == ""


def test_a_sasrec_that_was_not_compiled_is_named(drawn: Panels, tmp_path: Path) -> None:
    late = [row | {"mode": "compiled"} for row in _at(800, 4, 3706, m2rec=None, sasrec=None)]
    text = scaling.render([_scaling(_star() + late)], tmp_path)
    assert "compile" not in text, "skipped for another reason"
    late = [row | {"skipped": "not compiled: the time budget ran out (--budget-seconds 9)"} for row in late]
    text = " ".join(scaling.render([_scaling(_star() + late)], tmp_path).split())
    assert " No time was left to compile SASRec at: L=800. " in text
    pruned = [row | {"mode": "compiled"} for row in _at(800, 4, 3706, m2rec=None, sasrec=7.0)]
    assert "No time" not in scaling.render([_scaling(_star() + late + pruned)], tmp_path), "one form was"


@pytest.mark.parametrize(
    ("device", "left_out"), [("cpu", ""), ("cuda", " Left to the figure: L=100; L=400; L=1600; L=4096. ")]
)
def test_a_table_of_scaling_is_no_wider_than_a_page(device: str, left_out: str, drawn: Panels, tmp_path: Path) -> None:
    options = script.parse(["--device", "cpu"])
    options.seq_len, options.batch = script.SEQ_LEN[device], script.BATCH[device]
    rows: list[dict[str, Any]] = []
    for shape in script.shapes(options):
        rows += _at(shape.seq_len, shape.batch, shape.n_items, m2rec=1.0, sasrec=2.0)
    text = scaling.render([_scaling(rows)], tmp_path)
    heads = next(line for line in text.splitlines() if line.startswith("| model")).strip("| ").split(" | ")
    assert len(heads) == 2 + scaling.MOST_SHAPES
    ends = {"L=50", "L=8192", "batch 1", f"batch {max(options.batch):,}", "1,000,000 items"}
    assert {f"L=200, batch {options.batch[0]}, 3,706 items"} | ends <= set(heads)
    assert left_out in " ".join(text.split())
    assert ("Left to the figure" in text) == bool(left_out)
    whole = [sorted(options.seq_len), sorted(options.batch), sorted(options.catalogues)]
    assert [sorted({getattr(row, x) for row in own}) for x, _, own in drawn] == whole


def test_axes_without_a_row() -> None:
    with pytest.raises(ValueError, match="rows: expected at least one, got none"):
        _axes.base_of([])


@pytest.mark.parametrize("text", ["no markers", f"{report.END} {report.BEGIN}", report.BEGIN * 2 + report.END])
def test_a_readme_without_its_markers(text: str) -> None:
    with pytest.raises(ValueError, match="README.md: expected <!-- results -->"):
        report.replaced(text, "")
