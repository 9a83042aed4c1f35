"""A run that is killed, at whatever moment, and resumed ends in the same bytes as one that was left alone."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastm2rec import SequentialRecommender
from fastm2rec.storage import StorageError, load_tensors, save_tensors
from fastm2rec.training import RunError, RunFolder, train
from tests import _runs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

OPTIONS: dict[str, Any] = {"checkpoint_every": 2, "eval_batch": 7}


class Killer:
    """Trains in children that it kills; see tests/_killed.py."""

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests._killed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def train(self, out: Path, options: dict[str, Any], **request: Any) -> dict[str, Any]:
        """Train, from the last checkpoint if there is one, up to the end or to the chosen `moment`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        resume = "last" if out.exists() else None
        self._process.stdin.write(json.dumps({"out": str(out), "options": options, "resume": resume, **request}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait() == 0


@pytest.fixture(scope="module")
def killer(root: Path) -> Iterator[Killer]:
    killer = Killer(root)
    yield killer
    killer.close()


def _content(folder: Path) -> dict[str, Any]:
    """Every file of a run by name, to the byte; of the metrics what the clock has no part in."""
    content: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or "tensorboard" in path.parts:
            continue
        content[str(path.relative_to(folder))] = path.read_bytes()
    lines = [json.loads(line) for line in content["metrics.jsonl"].splitlines()]
    content["metrics.jsonl"] = [{name: line[name] for name in line if name != "clock"} for line in lines]
    return content


def _assert_same(ours: Path, theirs: Path, why: object) -> None:
    one, other = _content(ours), _content(theirs)
    assert one.keys() == other.keys(), why
    differing = [name for name in one if one[name] != other[name]]
    assert not differing, why


@pytest.fixture(scope="module")
def undisturbed(killer: Killer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that nobody disturbed, and its moments."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, killer.train(folder, OPTIONS)["moments"]


def test_the_moments_are_those_that_matter(undisturbed: tuple[Path, list[str]]) -> None:
    folder, moments = undisturbed
    assert moments.count("step") == 6
    assert moments.count("half of last.safetensors") == 4  # after steps 2 (of 3), 3, 4 (of 3 + 3) and 6
    assert moments.count("half a line") == 2
    for file in ("config.yaml", "run.json", "vocab.json", "config.json", "model.safetensors"):
        assert f"half of {file}" in moments
    assert {"config.yaml", "last.safetensors", "previous.safetensors", "best/vocab.json"} < _content(folder).keys()


# Writing a file takes seven moments: every eighth one of the run is each of these somewhere. `slow` takes them all.
@pytest.mark.parametrize("offset", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))])
def test_killed_at_any_moment_and_resumed(
    killer: Killer, undisturbed: tuple[Path, list[str]], tmp_path: Path, offset: int
) -> None:
    folder, moments = undisturbed
    for moment in range(offset, len(moments), 8):
        out = tmp_path / str(moment)
        why = f"killed at moment {moment}, {moments[moment]}"
        assert killer.train(out, OPTIONS, moment=moment) == {"killed": True}, why
        assert killer.train(out, OPTIONS).get("steps") == 6, why
        _assert_same(out, folder, why)
        shutil.rmtree(out)


@pytest.mark.parametrize(
    "options",
    [
        {"model": "m2rec", "loss": "bce", "clip": 0.1, "amp": "bf16"},
        pytest.param(
            {"model": "m2rec", "gate": "scalar", "micro_batch": 13, "mask": "soft", "weight_decay": 0.1},
            marks=pytest.mark.slow,
        ),
        {"model": "mamba4rec", "positions": "all", "epochs": 4, "patience": 1},
        {
            "model": "sasrec",
            "prefixes_per_user": 3,
            "batch_size": 20,
            "eval_every": 2,
            "epochs": 3,
            "tensorboard": True,
        },
        {"model": "bert4rec", "checkpoint_every": 5},
    ],
    ids=lambda options: options["model"],
)
def test_killed_again_and_again(killer: Killer, tmp_path: Path, options: dict[str, Any]) -> None:
    """Every model, with all that is random in it; a run that is always killed gets there in the end."""
    options = {**OPTIONS, **options}
    length = len(killer.train(tmp_path / "undisturbed", options)["moments"])
    generator = random.Random(repr(options))
    answer = {"killed": True}
    lives = 0
    while answer == {"killed": True}:
        # Some lives are too short for a checkpoint.
        answer = killer.train(tmp_path / "run", options, moment=generator.randrange(10, length // 2))
        lives += 1
        assert lives < 100
    assert "steps" in answer, answer
    assert lives > 2
    _assert_same(tmp_path / "run", tmp_path / "undisturbed", f"killed {lives - 1} times")


def test_killed_from_outside(killer: Killer, tmp_path: Path, undisturbed: tuple[Path, list[str]]) -> None:
    """By another process, in the middle of whatever it is that the kill meets."""
    out = tmp_path / "run"
    for file in ("config.yaml", "last.safetensors", "best/model.safetensors", "previous.safetensors"):
        assert killer.train(out, OPTIONS, seen=str(out / file)) == {"killed": True}
        assert killer.train(out, OPTIONS).get("steps") == 6
        _assert_same(out, undisturbed[0], f"killed when {file} appeared")
        shutil.rmtree(out)


def _damage(path: Path) -> None:
    path.unlink()  # not in place: the previous checkpoint may be the same file under a second name
    path.write_bytes(b"\x00" * 100)


def test_a_truncated_checkpoint_and_the_way_out(tmp_path: Path, undisturbed: tuple[Path, list[str]]) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    last = out / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    before = _content(out)
    told = (
        r"last.safetensors \([\d,]+ bytes\) is truncated .*; the checkpoint before it, previous.safetensors of step 4, "
        "is sound: --resume previous goes on from there"
    )
    with pytest.raises(StorageError, match=told):
        _runs.run(out, resume="last", **OPTIONS)
    assert _content(out) == before
    assert _runs.run(out, resume="previous", **OPTIONS).steps == 6
    # The first save after going back keeps the checkpoint that it went back to as the previous one.
    _assert_same(out, undisturbed[0], "resumed from the previous checkpoint")


def test_going_back_loses_nothing_when_it_is_killed(
    killer: Killer, tmp_path: Path, undisturbed: tuple[Path, list[str]]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(undisturbed[0], damaged)
    _damage(damaged / "last.safetensors")
    shutil.copytree(damaged, tmp_path / "counted")
    moments = killer.train(tmp_path / "counted", OPTIONS, resume="previous")["moments"]
    for moment in range(0, len(moments), 5):
        out = tmp_path / str(moment)
        shutil.copytree(damaged, out)
        assert killer.train(out, OPTIONS, resume="previous", moment=moment) == {"killed": True}
        answer = killer.train(out, OPTIONS)
        if "error" in answer:  # killed before it went back: the damaged one is still the last
            assert "--resume previous goes on from there" in answer["error"]
            answer = killer.train(out, OPTIONS, resume="previous")
        assert answer.get("steps") == 6, (moments[moment], answer)
        _assert_same(out, undisturbed[0], f"killed at moment {moment}, {moments[moment]}")
        shutil.rmtree(out)


def test_both_checkpoints_damaged_or_none_to_go_back_to(tmp_path: Path, undisturbed: tuple[Path, list[str]]) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    _damage(out / "last.safetensors")
    _damage(out / "previous.safetensors")
    with pytest.raises(StorageError, match="last.safetensors .*; there is no older checkpoint to go back to"):
        _runs.run(out, resume="last", **OPTIONS)
    with pytest.raises(StorageError, match=r"previous.safetensors \(100 bytes\) is truncated"):
        _runs.run(out, resume="previous", **OPTIONS)
    (out / "previous.safetensors").unlink()
    with pytest.raises(RunError, match="holds no previous.safetensors"):
        _runs.run(out, resume="previous", **OPTIONS)
    assert SequentialRecommender.from_pretrained(out / "best").n_items == 20


def test_checkpoints_of_something_else_are_refused(tmp_path: Path, undisturbed: tuple[Path, list[str]]) -> None:
    last = tmp_path / "run" / "last.safetensors"
    tensors, metadata = load_tensors(undisturbed[0] / "last.safetensors")
    name = "model/item_embedding.weight"
    adam = next(name for name in tensors if name.endswith("/exp_avg"))
    progress = json.loads(metadata["progress"])
    nan = tensors[name].clone()
    nan[0, 0] = float("nan")
    cases: list[tuple[dict[str, torch.Tensor], dict[str, str], str]] = [
        (tensors, {}, "last.safetensors is not a checkpoint of a run"),
        (tensors, {**metadata, "progress": "[1]"}, "last.safetensors is not a checkpoint of a run"),
        (tensors, {**metadata, "progress": json.dumps({**progress, "x": 1})}, "not a checkpoint of a run: counters"),
        ({key: tensors[key] for key in tensors if key != name}, metadata, f"lacks {name.removeprefix('model/')}"),
        ({**tensors, "model/x": torch.ones(1)}, metadata, "has unknown x"),
        ({**tensors, name: torch.ones(2, 2)}, metadata, r"expected shape \[21, 8\], got \[2, 2\]"),
        ({**tensors, name: nan}, metadata, "holds NaN or infinity"),
        ({**tensors, "adam/x/step": torch.ones(())}, metadata, "has optimiser state of the unknown parameter x"),
        ({**tensors, adam: torch.ones(3, 3, 3)}, metadata, "expected shape .*, got .3, 3, 3."),
    ]
    shutil.copytree(undisturbed[0], tmp_path / "run")
    for content, header, told in cases:
        save_tensors(last, content, header)
        with pytest.raises(StorageError, match=f"{told}.*--resume previous goes on from there"):
            _runs.run(tmp_path / "run", resume="last", **OPTIONS)


def test_lines_that_are_missing_are_noticed(tmp_path: Path, undisturbed: tuple[Path, list[str]]) -> None:
    shutil.copytree(undisturbed[0], tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b'{"epoch": 1')
    with pytest.raises(StorageError, match="metrics.jsonl: expected at least 2 lines, as its checkpoint says, got 0"):
        _runs.run(tmp_path / "run", resume="last", **OPTIONS)


def test_a_finished_run_stays_as_it_is_or_goes_on_with_more_epochs(
    tmp_path: Path, undisturbed: tuple[Path, list[str]]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    assert _runs.run(out, resume="last", **OPTIONS).steps == 6
    _assert_same(out, undisturbed[0], "resumed after its end")
    assert _runs.run(out, resume="last", **OPTIONS, epochs=4).steps == 12
    _runs.run(tmp_path / "at once", **OPTIONS, epochs=4)
    _assert_same(out, tmp_path / "at once", "two epochs and two more")


def test_resume_starts_where_there_is_nothing(tmp_path: Path, undisturbed: tuple[Path, list[str]]) -> None:
    _runs.run(tmp_path / "new", resume="last", **OPTIONS)
    _assert_same(tmp_path / "new", undisturbed[0], "started with resume")


def test_other_circumstances_are_told(tmp_path: Path, undisturbed: tuple[Path, list[str]]) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    reported: list[str] = []
    config = _runs.config(**OPTIONS, threads=2)
    with pytest.warns(UserWarning, match="was written with threads 1, and goes on with 2: the result may differ"):
        train(config, out, resume="last", inputs=_runs.inputs(), report=reported.append)
    assert reported == ["resuming after step 6, epoch 2 (last.safetensors)"]


def test_scalars_of_the_time_after_the_checkpoint_are_dropped(killer: Killer, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"tensorboard": True, "epochs": 3}
    moments = killer.train(tmp_path / "counted", options)["moments"]
    second_line = [place for place, name in enumerate(moments) if name == "half a line"][1]
    # After the second line and its scalars, before the checkpoint.
    assert killer.train(tmp_path / "run", options, moment=second_line + 4) == {"killed": True}
    assert len(RunFolder(tmp_path / "run").metrics()) == 2
    assert killer.train(tmp_path / "run", options)["steps"] == 9
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6, 9]


@pytest.mark.parametrize("call", range(13))
def test_no_disk_space_leaves_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The disk is full from the n-th flush of a file on: config, data, checkpoints, the model's files, metrics."""
    out = tmp_path / "run"
    flush = os.fsync
    calls = 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += stat.S_ISREG(os.fstat(handle).st_mode)  # a folder that cannot be flushed is no reason to stop
        if calls > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        try:
            _runs.run(out, **OPTIONS)
        except StorageError as error:
            assert "cannot write" in str(error)  # noqa: PT017
            assert "No space left on device" in str(error)  # noqa: PT017
            assert str(out) in str(error)  # noqa: PT017
        else:
            assert calls == call == 12
    assert not list(out.rglob("*.partial"))
    for path in out.rglob("*.safetensors"):
        load_tensors(path)
    for path in out.rglob("*.json"):
        json.loads(path.read_text())
    _runs.run(out, resume="last", **OPTIONS)
    _runs.run(tmp_path / "whole", **OPTIONS)
    _assert_same(out, tmp_path / "whole", f"full at flush {call}")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write .*file/run/.lock"):
        _runs.run(tmp_path / "file" / "run")
    with pytest.raises(RunError, match="file is a file; expected a folder for the run"):
        _runs.run(tmp_path / "file")


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Neither by torch nor by Python, in a whole run that is resumed and loaded; and no source file could."""
    import pickle

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load", "save"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    _runs.run(tmp_path / "run", **OPTIONS)
    _runs.run(tmp_path / "run", resume="previous", **OPTIONS)
    assert SequentialRecommender.from_pretrained(tmp_path / "run" / "best").recommend([[1]])
    forbidden = ("import pickle", "pickle.", "torch.load", "torch.save", "joblib", "marshal", "allow_pickle=True")
    sources = list((root / "fastm2rec").rglob("*.py"))
    assert len(sources) > 20
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text], path


def test_an_interrupt_leaves_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, and the same process tries again: the lock is free."""
    step = torch.optim.Adam.step
    calls = 0

    def interrupted(self: torch.optim.Adam, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _runs.run(tmp_path / "run", **OPTIONS)
    _runs.run(tmp_path / "run", resume="last", **OPTIONS)
    _runs.run(tmp_path / "whole", **OPTIONS)
    _assert_same(tmp_path / "run", tmp_path / "whole", "interrupted")
