"""The benchmark of the training step: its gradients are checked, and its step is a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import _driver, _registry, _training, train_step

CPU = torch.device("cpu")
SIZES = _registry.Sizes(50, 4, 5, torch.float32, CPU, text_dim=8)
SHAPE = _driver.Shape("float32", 7, 6, 50)


@pytest.fixture(scope="module")
def cases() -> list[_training.Case]:
    return _training.cases(_registry.MODELS, 7, SIZES)


@pytest.fixture(scope="module")
def inputs() -> _training._Inputs:
    return _training._Inputs(SHAPE, CPU)


def test_every_model_and_peer_has_a_row(cases: list[_training.Case]) -> None:
    rows = {(case.model, case.impl, case.mode, case.positions) for case in cases}
    assert {("sasrec", "as published", mode, "all") for mode in ("eager", "compiled")} <= rows
    assert {("sasrec", "last query", mode, "last") for mode in ("eager", "compiled")} <= rows
    assert ("bert4rec", "as published", "eager", "masked") in rows
    for impl in ("reference", "torch.fft + loop", "torch.fft + mamba_ssm", "triton", "cpu", "mamba_ssm"):
        assert ("m2rec", impl, "eager", "last") in rows
    assert all(len(case.skipped) > 10 for case in cases if case.skipped is not None)


def test_gradients_are_those_of_the_whole_batch(cases: list[_training.Case], inputs: _training._Inputs) -> None:
    for case in cases:
        if case.skipped is not None or case.mode != "eager":
            continue
        step = _training.Step(case, torch.float32, CPU)
        assert _training.error_of(step, case, inputs) < _training.TOLERANCE[torch.float32], (case.model, case.impl)
    # What the step minimises, written down once more: softmax over items 1 to 50 at the last position.
    case = next(case for case in cases if (case.model, case.impl, case.mode) == ("m2rec", "reference", "eager"))
    step = _training.Step(case, torch.float32, CPU)
    loss = step(*inputs.batches[0])
    ids, lengths, targets, _ = inputs.batches[0]
    model = case.module
    assert model is not None
    scores = model(ids, lengths) @ model.get_parameter("item_embedding.weight").t()
    scores[:, 0] = -torch.inf
    torch.testing.assert_close(loss, F.cross_entropy(scores, targets[:, -1]).detach())


def test_a_wrong_gradient_is_seen(cases: list[_training.Case], inputs: _training._Inputs) -> None:
    case = next(case for case in cases if (case.model, case.impl, case.mode) == ("m2rec", "reference", "eager"))
    step = _training.Step(case, torch.float32, CPU)
    bias = step.parameters["fusion.linear.bias"]
    handle = bias.register_hook(lambda gradient: gradient * 1.01)
    assert _training.error_of(step, case, inputs) == pytest.approx(0.01, rel=0.1)
    handle.remove()


def test_the_weights_stay_those_that_were_checked(cases: list[_training.Case], inputs: _training._Inputs) -> None:
    case = next(case for case in cases if (case.model, case.impl, case.mode) == ("sasrec", "last query", "eager"))
    step = _training.Step(case, torch.float32, CPU)
    before = {name: parameter.detach().clone() for name, parameter in step.parameters.items()}
    step(*inputs.batches[0])
    assert all(torch.equal(before[name], parameter) for name, parameter in step.parameters.items())
    numbers = sum(parameter.numel() for parameter in step.parameters.values())
    counters = len(before) * 4 / 2**20  # Adam counts its steps once for each parameter
    assert step.state_mb() == pytest.approx(4 * 4 * numbers / 2**20 + counters), "weights, gradients, two moments"


def test_implementations_train_parameters_of_their_own(cases: list[_training.Case]) -> None:
    modules = [case.module for case in cases if case.module is not None]
    addresses = [parameter.data_ptr() for module in modules for parameter in module.parameters()]
    assert len(addresses) == len(set(addresses))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    flags = ["--d-state", "4", "--n-items", "50", "--device", "cpu", "--seq-len", "7", "--batch", "4", "--eager-only"]
    flags += ["--models", "m2rec", "sasrec", "--dtype", dtype, "--budget-seconds", "1"]
    train_step.main([*flags, "--out", str(out), "--plot", str(plot)])
    rows = [row for row in json.loads(out.read_text())["rows"] if row["median_ms"]]
    assert {(row["impl"], row["positions"]) for row in rows} >= {("last query", "last"), ("as published", "all")}
    assert {("reference", "last"), ("torch.fft + loop", "last")} <= {(row["impl"], row["positions"]) for row in rows}
    assert all(row["phase"] == "training" and 0 < row["bound_share"] < 1 for row in rows)
    assert "loss at" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    flags = ["--seq-len", "50", "--batch", "64", "--models", "m2rec", "sasrec", "--dtype", "bfloat16"]
    train_step.main([*flags, "--impls", "triton", "last query", "--budget-seconds", "1", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    done = {(row["model"], row["mode"]) for row in rows if row["median_ms"]}
    assert {("m2rec", "eager"), ("m2rec", "graph"), ("sasrec", "eager"), ("sasrec", "graph")} <= done, rows
