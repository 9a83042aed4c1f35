"""Exported graphs in the runtimes that they are for, against the model that was exported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastm2rec import M2Rec, M2RecConfig, SASRec, SASRecConfig
from fastm2rec.cli import main
from fastm2rec.export import ExportableEncoder, export_program, run_onnx, save_onnx, save_program
from tests.test_folded import VARIANTS, batch, build, identify, padded

# As the issue asks; float32 loses about 1e-6 of values of order one.
TOLERANCE = 1e-5

ONNX = [
    {"filter_placement": "inner", "spectrum": "padded", "gate": "context"},
    {"filter_placement": "input", "spectrum": "valid", "gate": "scalar", "stride": 3},
    {"filter_placement": "inner", "spectrum": "valid", "gate": "none", "mask": "soft"},
    {"filter_placement": "input", "spectrum": "padded", "gate": "none", "scan_norm": True},
    {"filter_placement": "none", "gate": "linear", "gate_residual": True},
    {"max_len": 2, "gate": "none"},
]


def _expected(model: M2Rec, item_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.encode(padded(item_ids, lengths), lengths)


def _check(model: M2Rec, encode: Any) -> None:
    """Batches of other sizes and lengths than the one that was traced; behind a row's length stands anything."""
    full = model.max_len
    for lengths, seqlen in (([1], 1), ([full], full), ([1, full, 2, full - 1, 1], full), ([2, 1], 2)):
        item_ids, n = batch(lengths, seqlen)
        torch.testing.assert_close(encode(item_ids, n), _expected(model, item_ids, n), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("fields", VARIANTS, ids=identify)
def test_the_module_that_is_exported(fields: dict[str, Any]) -> None:
    model = build(**fields).float()
    if model.max_len > 2:
        _check(model, ExportableEncoder(model))


def test_a_program(tmp_path: Path) -> None:
    model = build(gate="context").float()
    save_program(model, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    _check(model, program.module())
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in function", "_operator")) for name in names), names
    assert not [name for name in names if "fft" in name or "while" in name]


@pytest.mark.slow
@pytest.mark.parametrize("fields", ONNX, ids=identify)
def test_onnx_runtime(fields: dict[str, Any], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = build(**fields).float()
    path = tmp_path / "model.onnx"
    save_onnx(model, path)
    _check(model, lambda item_ids, lengths: run_onnx(path, item_ids, lengths)[0])
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}  # ONNX's own operators
    assert not {node.op_type for node in graph.node} & {"Loop", "Scan", "If", "DFT", "STFT"}
    assert [value.name for value in (*graph.input, *graph.output)] == ["item_ids", "lengths", "query"]


@pytest.mark.slow
def test_onnx_with_the_best_items_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    model = build(gate="none").float()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model.onnx"
    assert main(["export", str(tmp_path / "model"), "--format", "onnx", "--top-k", "4", "--out", str(path)]) == 0
    assert "finds 100.00% of the 4 best items" in capsys.readouterr().out
    item_ids, lengths = batch([3, 24], 24)
    query, items, scores = run_onnx(path, item_ids, lengths)
    with torch.no_grad():
        best, ids = model.score(_expected(model, item_ids, lengths)).topk(4)
    assert torch.equal(items, ids)
    torch.testing.assert_close(scores, best, rtol=TOLERANCE, atol=TOLERANCE)
    assert query.shape == (2, 16)


def test_an_index_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    SASRec(SASRecConfig(n_items=60, max_len=8, d_model=16)).save_pretrained(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), "--format", "faiss", "--out", str(tmp_path / "items.faiss")]
    assert main([*arguments, "--index", "Flat"]) == 0
    assert "Flat of 60 items; recall@10 against the exact answer, on 256 random histories: 1.0000" in (
        capsys.readouterr().out
    )
    assert main([*arguments, "--index", "Tree"]) == 1
    assert "FAISS cannot build 'Tree'" in capsys.readouterr().err
    assert main([*arguments, "-k", "61"]) == 1
    assert "k: expected an integer from 1 to 60" in capsys.readouterr().err


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    SASRec(SASRecConfig(n_items=60, max_len=8, d_model=16)).save_pretrained(tmp_path / "sasrec")
    model = build(gate="none").float()
    model.save_pretrained(tmp_path / "m2rec")

    def refused(folder: str, out: str, message: str, *more: str) -> None:
        assert main(["export", str(tmp_path / folder), "--out", str(tmp_path / out), *more]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / out).exists()

    refused("sasrec", "a.onnx", "expected a one-layer m2rec, got a sasrec model", "--format", "onnx")
    refused("nowhere", "a.onnx", "No such file", "--format", "onnx")
    refused("m2rec", "a.pt", "expected a name that ends in .pt2", "--format", "torch")
    refused("m2rec", "a.pt2", "k: expected 1 to 30", "--format", "torch", "--top-k", "31")
    with pytest.raises(ValueError, match="n_layers: expected 1 for a model that can be folded, got 2"):
        export_program(M2Rec(M2RecConfig(n_items=9, gate="none", n_layers=2)))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused("m2rec", "a.onnx", "pip install 'fastm2rec[onnx]'", "--format", "onnx")
