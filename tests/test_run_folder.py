"""A run's folder belongs to one run, one process and one log; whatever else it meets is refused before anything is
written over."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastm2rec.storage import StorageError
from fastm2rec.training import Inputs, RunError, RunFolder, loop, train
from tests import _runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of SASRec."""
    _runs.run(tmp_path / "run")
    return tmp_path / "run"


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_in_it(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "best", "config.yaml", "last.safetensors", "metrics.jsonl", "previous.safetensors", "run.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (run / "best").iterdir()) == [
        "config.json", "model.safetensors", "popularity.safetensors", "vocab.json",
    ]  # fmt: skip
    folder = RunFolder(run)
    assert folder.config() == _runs.config()
    manifest = folder.manifest()
    assert manifest["data"] == json.loads(json.dumps(_runs.inputs().describe()))
    assert {"fastm2rec", "torch", "python", "device", "threads", "processes"} < manifest.keys()
    assert len(folder.metrics()) == 2


def test_a_run_is_not_started_twice(run: Path) -> None:
    before = _bytes(run)
    with pytest.raises(RunError, match="run already holds this run; pass --resume to go on with it, or another --out"):
        _runs.run(run)
    assert _bytes(run) == before


@pytest.mark.parametrize("resume", [None, "last", "previous"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": 0.5}, r"lr \(0.001 there, 0.5 here\)"),
        ({"d_model": 16, "seed": 1}, r"d_model \(8 there, 16 here\), seed \(0 there, 1 here\)"),
        ({"model": "bert4rec", "batch_size": 60}, r"mask_prob \(None there, 0.2 here\), model \('sasrec'"),
        ({"amp": "bf16", "user_min": 3}, r"amp \('none' there, 'bf16' here\), user_min \(5 there, 3 here\)"),
    ],
)  # fmt: skip
def test_other_options_are_refused_by_name(run: Path, resume: Any, options: dict[str, Any], told: str) -> None:
    before = _bytes(run)
    with pytest.raises(RunError, match=f"run holds a run with other options: {told}.*; choose another --out"):
        _runs.run(run, resume=resume, **options)
    assert _bytes(run) == before


def test_options_that_do_not_change_the_result_may_differ(run: Path) -> None:
    options: dict[str, Any] = {"data": "elsewhere", "checkpoint_every": 1, "epochs": 3, "patience": 7}
    _runs.run(run, resume="last", **options)
    assert RunFolder(run).config() == _runs.config(**options)


def _with(data: Inputs, **changes: Any) -> Inputs:
    return dataclasses.replace(data, **changes)


def test_other_data_is_refused(run: Path) -> None:
    before = _bytes(run)
    told = "run was made from other data: 24 users, 20 items, 240 events there; 25 users, 20 items, 250 events here"
    with pytest.raises(RunError, match=told):
        _runs.run(run, resume="last", source=_runs.inputs(n_users=25), epochs=9)
    assert _bytes(run) == before  # what the refused run would have changed, the epochs, is not recorded
    one_event = _runs.inputs().dataset.items.clone()
    one_event[17] = one_event[17] % 20 + 1
    changed = _with(_runs.inputs(), dataset=dataclasses.replace(_runs.inputs().dataset, items=one_event))
    with pytest.raises(RunError, match="was made from other data"):
        _runs.run(run, resume="last", source=changed)
    text = _runs.inputs().text
    assert text is not None
    with pytest.raises(RunError, match="was made with other text embeddings: memory there, memory here"):
        _runs.run(run, resume="last", source=_with(_runs.inputs(), text=text + 1))
    with pytest.raises(RunError, match="was made with other text embeddings: memory there, None here"):
        _runs.run(run, resume="last", source=_with(_runs.inputs(), text=None))
    assert _bytes(run) == before
    # The same log in another place is the same log.
    _runs.run(run, resume="last", source=_with(_runs.inputs(), files=("moved",), text_source="moved"))


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("a year of work")
    with pytest.raises(RunError, match="is not empty and holds no run: thesis.tex"):
        _runs.run(tmp_path, resume="last")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_that_lost_its_config_is_not_overwritten(run: Path) -> None:
    (run / "config.yaml").unlink()
    with pytest.raises(RunError, match="is not empty and holds no run: best, last.safetensors, metrics.jsonl"):
        _runs.run(run, resume="last")


def test_a_run_that_was_killed_before_it_was_recorded_leaves_no_claim(tmp_path: Path, run: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    (new / "run.json").write_bytes((run / "run.json").read_bytes())
    _runs.run(new, source=_runs.inputs(n_users=25))
    assert RunFolder(new).manifest()["data"]["users"] == 25


@pytest.mark.parametrize("content", ["", "lr: [", "- 1", "lr: fast", "colour: red"])
def test_a_damaged_config_is_named(run: Path, content: str) -> None:
    (run / "config.yaml").write_text(content)
    with pytest.raises(RunError, match="run/config.yaml: "):
        _runs.run(run, resume="last")
    with pytest.raises(RunError, match="run/config.yaml: "):
        RunFolder(run).config()


def test_a_damaged_manifest_is_named(run: Path) -> None:
    (run / "run.json").write_text("{")
    with pytest.raises(StorageError, match="run.json is not valid JSON"):
        _runs.run(run, resume="last")


def test_another_process_in_the_folder(run: Path, root: Path) -> None:
    pytest.importorskip("fcntl")
    code = f"""
import fcntl, sys
lock = open({str(run / ".lock")!r}, "ab")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
    before = _bytes(run)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="run: another process is training in this folder"):
            _runs.run(run, resume="last")
        other.communicate("")
    assert _bytes(run) == before
    _runs.run(run, resume="last")


def test_the_lock_is_held_while_a_run_goes_on_and_free_when_it_ended(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    inside: list[BaseException] = []

    def intrude(line: str) -> None:
        try:
            _runs.run(tmp_path, resume="last")
        except RunError as error:
            inside.append(error)

    train(_runs.config(), tmp_path, inputs=_runs.inputs(), report=intrude)
    assert [str(error) for error in inside] == [f"{tmp_path}: another process is training in this folder"] * 2
    kept = None
    try:
        _runs.run(tmp_path, resume="last", lr=1.0)
    except RunError as error:
        kept = error  # its traceback keeps what refused alive, as a notebook does
    _runs.run(tmp_path, resume="last")
    assert kept is not None


def test_leftovers_of_a_killed_process_are_removed(run: Path) -> None:
    for path in (run / ".last.safetensors.abc.partial", run / "best" / ".model.safetensors.x.partial"):
        path.write_text("half")
    _runs.run(run, resume="last")
    assert not list(run.rglob("*.partial"))


def test_metrics_of_a_run_that_was_killed_can_be_read(run: Path, tmp_path: Path) -> None:
    folder = RunFolder(run)
    whole = folder.metrics()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"epoch": 3, "st')
    assert folder.metrics() == whole
    (run / "metrics.jsonl").write_text("{\n")
    with pytest.raises(StorageError, match="cannot read .*metrics.jsonl"):
        folder.metrics()
    with pytest.raises(StorageError, match="cannot read .*metrics.jsonl"):
        RunFolder(tmp_path / "nowhere").metrics()


def test_no_run_is_there(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match="holds no run: there is no config.yaml"):
            RunFolder(place).config()


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be refused without the folder is refused before it is made."""
    with pytest.raises(ValueError, match="positions: expected 'last' with model=m2rec"):
        _runs.run(tmp_path / "run", "m2rec", positions="all")
    monkeypatch.setattr(loop, "make_model", lambda config, inputs: os.stat("/nonexistent"))
    with pytest.raises(FileNotFoundError):
        _runs.run(tmp_path / "run")
    assert not list(tmp_path.iterdir())
