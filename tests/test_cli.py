"""The command line, from a log to recommendations, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from fastm2rec import M2Rec, M2RecConfig, SASRec
from fastm2rec.cli import COMMANDS, main
from fastm2rec.data import load_dataset, synthetic
from fastm2rec.training import RunFolder, evaluate

SMALL = ["--max-len", "8", "--d-model", "16", "--epochs", "2", "--batch-size", "512", "--prefixes-per-user", "4"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CSV whose columns have other names than the package's."""
    folder = tmp_path_factory.mktemp("log")
    made = synthetic(n_users=60, n_items=28, length=20)
    frame = made.log.rename({"user": "who", "item": "what", "timestamp": "when"})
    frame.with_columns(pl.format("sku-{}", "what").alias("what")).write_csv(folder / "events.csv")
    return folder


@pytest.fixture(scope="module")
def prepared(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "prepared"
    columns = ["--user-column", "who", "--item-column", "what", "--timestamp-column", "when"]
    assert main(["prepare", "--dataset", "table", "--data", str(log), "--out", str(folder), *columns]) == 0
    return folder


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sasrec"
    where = ["--dataset", "prepared", "--data", str(prepared), "--out", str(folder)]
    assert main(["train", "--model", "sasrec", *where, *SMALL]) == 0
    return folder


def test_prepare_keeps_the_log(prepared: Path, log: Path) -> None:
    dataset = load_dataset("prepared", prepared).dataset
    events = pl.read_csv(log / "events.csv")
    assert dataset.statistics()["events"] == len(events)
    for place, user in enumerate(dataset.users[:5]):
        expected = events.filter(pl.col("who") == user).sort("when", maintain_order=True)["what"].to_list()
        assert dataset.vocab.decode(dataset.sequence(place).tolist()) == expected


def test_prepare_keeps_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--dataset", "synthetic", "--out", str(tmp_path / "out")]) == 0
    assert "0 items without" in capsys.readouterr().out
    text = load_dataset("prepared", tmp_path / "out", text="auto").text
    original = load_dataset("synthetic", text="auto").text
    assert text is not None
    assert original is not None
    assert torch.equal(text.table, original.table)


def test_train_leaves_a_model(run: Path, prepared: Path) -> None:
    model = SASRec.from_pretrained(run / "best")
    assert model.config.max_len == 8
    lines = RunFolder(run).metrics()
    assert [line["epoch"] for line in lines] == [1, 2]
    dataset = load_dataset("prepared", prepared).dataset
    best = max(line["valid"]["NDCG@10"] for line in lines)
    assert evaluate(model, dataset, "valid").compute()["NDCG@10"] == pytest.approx(best)


def test_evaluate(run: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--json", str(tmp_path / "test.json")]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "test.json").read_text())
    expected = evaluate(SASRec.from_pretrained(run / "best"), load_dataset("prepared", prepared).dataset).compute()
    assert written["sasrec"] == expected
    assert written["popularity"].keys() == expected.keys()
    assert f"{expected['HR@10']:.4f}" in printed
    assert "each of 60 users" in printed
    masked = tmp_path / "masked.json"
    assert main(["evaluate", str(run), "--mask-history", "--split", "valid", "--json", str(masked)]) == 0
    assert "second to last" in json.loads(masked.read_text())["protocol"]
    assert "less those of the history" in json.loads(masked.read_text())["protocol"]


def test_recommend(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = ["sku-1", "sku-2", "sku-3"]
    expected = SASRec.from_pretrained(run / "best").recommend([history, ["sku-9"]], 3)
    assert main(["recommend", str(run), "--history", *history, "-k", "3", "--json"]) == 0
    assert [entry["item"] for entry in json.loads(capsys.readouterr().out)] == [item for item, _ in expected[0]]
    file = tmp_path / "histories.txt"
    file.write_text("sku-1 sku-2 sku-3\n\nsku-9\n")
    assert main(["recommend", str(run / "best"), "--file", str(file), "-k", "3"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert [[line.split()[1] for line in block.splitlines()[1:]] for block in blocks] == [
        [item for item, _ in answer] for answer in expected
    ]
    assert main(["recommend", str(run), "--history", "sku-1", "nope", "-k", "2", "--skip-unknown"]) == 0
    assert main(["recommend", str(run), "--history", "sku-1", "-k", "28", "--include-seen"]) == 0
    assert "sku-1 " in capsys.readouterr().out


def test_recommend_shows_titles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = load_dataset("synthetic").dataset
    model = M2Rec(M2RecConfig(n_items=dataset.n_items, max_len=8, d_model=16, d_state=4, gate="none"))
    model.vocab = dataset.vocab
    model.save_pretrained(tmp_path / "model")
    assert main(["recommend", str(tmp_path / "model"), "--history", "3", "-k", "1"]) == 0
    (best,) = model.recommend([[3]], 1)[0]
    assert capsys.readouterr().out.split(maxsplit=3)[3].strip() == dataset.vocab.title(best.item)


def test_a_config_file_and_flags_over_it(run: Path, tmp_path: Path) -> None:
    from fastm2rec.cli.train import _parse_run

    config = RunFolder(run).config()
    parsed, _ = _parse_run(["--config", str(run / "config.yaml")])
    assert parsed == config
    changed, options = _parse_run(["--config", str(run / "config.yaml"), "--lr=0.5", "--out", "x"])
    assert changed.differences(config) == ["lr"]
    assert options.out == "x"
    beauty, _ = _parse_run(["--preset", "beauty", "--model", "mamba4rec", "--max-len", "9"])
    assert isinstance(beauty.model, M2RecConfig)
    assert (beauty.model.max_len, beauty.model.dropout, beauty.model.gate) == (9, 0.4, "none")


def test_train_goes_on_or_refuses(run: Path, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["train", "--config", str(run / "config.yaml"), "--out", str(run)]
    assert main(again) == 1
    assert "already holds this run; pass --resume to go on with it" in capsys.readouterr().err
    assert main([*again, "--lr", "0.5"]) == 1
    assert "lr (0.001 there, 0.5 here)" in capsys.readouterr().err
    assert main([*again, "--resume"]) == 0
    assert "resuming after step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{nowhere}"], "holds no run: there is no config.yaml"),
        (["recommend", "{nowhere}", "--history", "1"], "cannot read .*config.json: No such file"),
        (["recommend", "{run}", "--history", "sku-1", "nope"], "unknown item id 'nope' at position 1"),
        (["recommend", "{run}", "--history", "sku-1", "-k", "29"], "k: expected an integer from 1 to 28"),
        (["recommend", "{run}", "--file", "{nowhere}"], "No such file"),
        (["train", "--model", "gpt"], "model: expected one of m2rec, mamba4rec, sasrec, bert4rec, gru4rec, got 'gpt'"),
        (["train", "--config", "{nowhere}"], "No such file"),
        (["train", "--dataset", "ml-1m", "--data", "{nowhere}"], "no such file or folder"),
        (["train", "--dataset", "prepared", "--data", "{data}", "--out", "{nowhere}"], "gate='scalar' reads text"),
        (["train", "--positions", "all", "--out", "{nowhere}"], "its low-pass filter mixes every item"),
        (["train", "--device", "cuda:99", "--out", "{nowhere}"], "device: cuda:99 was asked for"),
        (["prepare", "--dataset", "synthetic", "--out", "{data}"], "is not empty; name a new folder"),
        (["prepare", "--dataset", "amazon", "--download", "--data", "{nowhere}", "--out", "{nowhere}"], "expected one"),
    ],
)
def test_what_goes_wrong_is_one_line(
    arguments: list[str], message: str, run: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"nowhere": tmp_path / "nowhere", "run": run, "data": prepared}
    assert main([word.format(**places) for word in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"fastm2rec {arguments[0]}: error: ")

    assert re.search(message, captured.err), captured.err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--no-such-option", "3"], "no_such_option"),
        (["train", "--model", "sasrec", "--theta", "0.2"], "theta"),
        (["train", "--mask", "sof"], "Got value: sof"),
        (["recommend", "x"], "one of the arguments --history --file is required"),
        (["recommend", "x", "--history", "1", "-k", "0"], "expected a whole number of at least 1, got '0'"),
        (["prepare", "--dataset", "ml-1m", "--user-column", "u", "--out", "x"], "has no columns to name"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: fastm2rec {command}" in printed
    assert "Unvalidated" not in printed, "jsonargparse could not read the type of an option"


def test_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastm2rec.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fastm2rec ")
