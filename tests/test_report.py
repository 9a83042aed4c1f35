"""The README's results are the records', to the letter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench._sections import _record, models, targets

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
    for figure in ("latency-cpu-x.png", "roofline-gpu.png"):
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


@pytest.mark.parametrize("text", ["no markers", f"{report.END} {report.BEGIN}", report.BEGIN * 2 + report.END])
def test_a_readme_without_its_markers(text: str) -> None:
    with pytest.raises(ValueError, match="README.md: expected <!-- results -->"):
        report.replaced(text, "")
