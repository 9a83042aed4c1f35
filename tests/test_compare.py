"""Two result files side by side: the band decides, not the ratio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import compare


def _row(median: float | None, low: float = 0.0, high: float = 0.0, **fields: Any) -> dict[str, Any]:
    row = {"model": "m2rec", "impl": "cpu", "mode": "eager", "dtype": "float32", "batch": 1, "seq_len": 50}
    return {**row, "median_ms": median, "p20_ms": low or median, "p80_ms": high or median, **fields}


def _document(*rows: dict[str, Any], **head: Any) -> dict[str, Any]:
    same = {"device": "X", "torch": "2", "triton": "3", "python": "3.11", "kernels_tree": "abc"}
    return {**same, **head, "rows": list(rows)}


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (_row(2.0, 1.9, 2.1), _row(1.0, 0.9, 1.1), "faster"),
        (_row(2.0, 1.9, 2.1), _row(2.5, 2.2, 2.6), "slower"),
        (_row(2.0, 1.0, 3.0), _row(1.5, 1.2, 1.8), "within noise"),  # a large difference between wide bands
        (_row(2.0), _row(2.0), "within noise"),
    ],
)
def test_verdicts(before: dict[str, Any], after: dict[str, Any], verdict: str) -> None:
    (one,) = compare.ratios(_document(before), _document(after))
    assert one.verdict == verdict
    assert one.ratio == after["median_ms"] / before["median_ms"]
    assert one.low == after["p20_ms"] / before["p80_ms"]


def test_only_the_same_measurement_is_compared() -> None:
    rows = [_row(1.0), _row(1.0, impl="triton"), _row(1.0, phase="training"), _row(None, batch=2)]
    after = [_row(1.0, phase="inference", script="latency"), _row(1.0, batch=2), _row(1.0, dtype="bfloat16")]
    found = compare.ratios(_document(*rows), _document(*after))
    assert [one.label for one in found] == ["m2rec inference, float32, B=1, L=50: cpu, eager"]


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(_document(_row(1.0, 0.9, 1.1))))
    b.write_text(json.dumps(_document(_row(2.0, 1.8, 2.2), device="Y")))
    assert compare.main([str(a), str(b)]) == 0, "a ratio alone fails nothing"
    said = capsys.readouterr().out
    assert "note: device differs: X and Y" in said
    assert "0 faster, 1 slower, 0 within noise" in said
    assert compare.main([str(a), str(b), "--fail-above", "1.7"]) == 0, "its band begins at 1.8 / 1.1"
    assert compare.main([str(a), str(b), "--fail-above", "1.6"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a result file with rows: JSONDecodeError"),
        ("[]", "expected a result file with rows: TypeError"),
        ('{"rows": []}', "no measured row in common"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(SystemExit):
        compare.main([str(path), str(path)])
    assert message in capsys.readouterr().err
