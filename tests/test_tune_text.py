"""Tuning a sentence encoder: which pairs it sees, that it learns from them, and what it leaves behind."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastm2rec import Vocabulary
from fastm2rec.cli import main
from fastm2rec.data import DataError, SequenceDataset, load_dataset, load_text_table
from fastm2rec.storage import read_json
from fastm2rec.text import Template, embed_items, item_table, load_encoder, training_pairs, tune_encoder
from fastm2rec.text.tune import _text_pairs
from tests._encoders import invented, small_model


def _dataset(sequences: list[list[int]], vocab: Vocabulary | None = None) -> SequenceDataset:
    rows = [(user, item, time) for user, items in enumerate(sequences) for time, item in enumerate(items)]
    log = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    return SequenceDataset.from_log(log, vocab=vocab)


histories = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=9), min_size=1, max_size=4)


@given(histories, st.integers(1, 4))
def test_pairs_stand_within_the_window_of_a_users_training_items(sequences: list[list[int]], window: int) -> None:
    dataset = _dataset(sequences)
    training = [items[:-2] if len(items) >= 3 else items for items in sequences]
    expected = Counter(
        (items[i], items[j])
        for items in training
        for i, j in itertools.combinations(range(len(items)), 2)
        if j - i <= window and items[i] != items[j]
    )
    pairs = training_pairs(dataset, window)
    assert pairs.shape[1:] == (2,)
    assert Counter(tuple(dataset.vocab.decode(pair)) for pair in pairs.tolist()) == expected


@given(histories, st.integers(1, 9))
def test_what_is_held_out_leaves_no_trace(sequences: list[list[int]], window: int) -> None:
    """Validation and test items that occur nowhere else are in no pair, and which ones they are does not matter."""
    one, two = (
        training_pairs(_dataset([[*items, *held_out] for items in sequences], Vocabulary(range(1, 11))), window)
        for held_out in ([7, 8], [9, 10])
    )
    assert torch.equal(one, two)
    assert (one <= 6).all()


def test_pairs_of_texts() -> None:
    dataset = _dataset([[1, 2, 3, 4, 5, 9, 9], [5, 1, 9, 9]])
    texts = ["one", "two", "", "four", "four", "nine"]
    pairs = training_pairs(dataset)
    anchors, positives = _text_pairs(pairs, texts, None, seed=0)
    assert list(zip(anchors, positives, strict=True)) == [("one", "two"), ("four", "one")]
    chosen = [_text_pairs(pairs, texts, 1, seed) for seed in range(20)]
    assert {len(anchors) for anchors, _ in chosen} == {1}
    assert {anchors[0] for anchors, _ in chosen} == {"one", "four"}
    assert chosen[0] == _text_pairs(pairs, texts, 1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": 1}, "batch_size: expected at least 2, got 1"),
        ({"max_pairs": 0}, "max_pairs: expected at least 1, got 0"),
        ({"lr": 0.0}, "lr: expected a number above 0, got 0.0"),
        ({"lr": float("nan")}, "lr: expected a number above 0, got nan"),
        ({"texts": ["a"]}, r"texts: expected one per item \(3\), got 1"),
        ({"texts": ["a", "", "a"]}, "none of 4 pairs of training items has two different texts"),
        ({"out": "full"}, "full is not empty; name a new folder"),
    ],
)
def test_what_cannot_be_tuned_is_refused(options: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    given = {"texts": ["a", "b", "c"], "model": invented(), **options, "out": tmp_path / options.get("out", "new")}
    with pytest.raises(ValueError, match=message):
        tune_encoder(_dataset([[1, 2, 3, 1, 2, 3, 3]]), **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def _nearest(model: str | Path, texts: list[str]) -> list[str]:
    """Which of the other texts lies nearest to each."""
    rows = torch.from_numpy(load_encoder(model, device="cpu").encode(texts))
    return [texts[place] for place in (rows @ rows.T).fill_diagonal_(-2).argmax(dim=1)]


@pytest.mark.slow
def test_a_tuned_encoder_has_learnt_and_embeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    base, out, table = small_model(), tmp_path / "tuned", tmp_path / "text.safetensors"
    # Users alternate between two things whose texts have nothing in common.
    names = ["quartz", "oboe", "tundra", "ledger", "mango", "piston", "sonnet", "harbour"]
    (tmp_path / "names.csv").write_text("item,title\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    rows = [f"{user},{item},{time}\n" for user in range(8) for time in range(10) for item in [user // 2 * 2 + time % 2]]
    (tmp_path / "events.csv").write_text("user,item,timestamp\n" + "".join(rows))
    log = ["--dataset", "table", "--data", str(tmp_path / "events.csv"), "--item-file", str(tmp_path / "names.csv")]
    tune = ["tune-text", *log, "--model", base, "--out", str(out), "--max-pairs", "24", "--batch-size", "6", "--device",
            "cpu", "--template", "{title}", "--lr", "2e-4"]  # fmt: skip
    assert main(tune) == 0
    assert "24 pairs, " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.csv", "names.csv", "tuned"]
    record = read_json(out / "tuning.json")
    assert (record["base"], record["pairs"], record["window"]) == (base, 24, 1)
    partners = [names[place ^ 1] for place in range(len(names))]
    assert sum(map(str.__eq__, _nearest(base, names), partners)) <= 2
    assert _nearest(out, names) == partners

    embed = ["embed-items", *log, "--model", str(out), "--template", "{title}", "--cache", str(tmp_path), "--out"]
    assert main([*embed, str(table)]) == 0
    loaded = load_dataset("table", tmp_path / "events.csv")
    items = item_table(loaded, pl.read_csv(tmp_path / "names.csv"))
    expected = embed_items(items, load_encoder(out), Template("{title}").text, progress=False)
    assert torch.equal(load_text_table(table).embeddings, expected.table.embeddings)
    assert main(tune) == 1
    assert "is not empty; name a new folder" in capsys.readouterr().err


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastm2rec.text import tune

    pytest.importorskip("datasets")

    def fail(encoder: object, pairs: object, out: Path, *rest: object) -> None:
        out.mkdir()
        (out / "half").write_text("")
        raise DataError("stopped")

    monkeypatch.setattr(tune, "_train", fail)
    with pytest.raises(DataError, match="stopped"):
        tune_encoder(_dataset([[1, 2, 3, 1, 2]]), ["a", "b", "c"], tmp_path / "out", invented())
    assert list(tmp_path.iterdir()) == []
