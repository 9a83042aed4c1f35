"""From a log to sequences: the k-core, the order in time, dense ids, and the folder that holds a data set."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from fastm2rec import StorageError, Vocabulary
from fastm2rec.data import DataError, SequenceDataset, k_core, order
from fastm2rec.storage import load_tensors, save_tensors, write_json

Event = tuple[Any, Any, int | None]

# Few users, items and times make repeats, ties and cascades of the k-core common.
events = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40)


def _log(rows: list[Event]) -> pl.DataFrame:
    kinds = [pl.Int64 if isinstance(value, int) else pl.String for value in rows[0][:2]]
    schema = {"user": kinds[0], "item": kinds[1], "timestamp": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _own_ids(dataset: SequenceDataset) -> dict[Any, list[Any]]:
    """Every user's items as the log had them."""
    return {
        user: dataset.vocab.decode(dataset.sequence(place).tolist()) for place, user in enumerate(dataset.users)
    }  # fmt: skip


def _naive_core(rows: list[Event], user_min: int, item_min: int) -> list[Event]:
    """One user or item at a time, in no particular order: the k-core does not depend on it."""
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        scarce = [user for user in users if users[user] < user_min]
        rare = [item for item in items if items[item] < item_min]
        if not scarce and not rare:
            return rows
        rows = [row for row in rows if row[0] not in scarce[:1] and (scarce or row[1] != rare[0])]


@settings(deadline=None)
@given(events, st.integers(0, 4), st.integers(0, 4))
def test_k_core_is_that_of_a_naive_loop_and_a_fixed_point(rows: list[Event], user_min: int, item_min: int) -> None:
    expected = _naive_core(rows, user_min, item_min)
    if not expected:
        with pytest.raises(
            DataError, match=f"no user with {user_min} and item with {item_min} events is left of {len(rows)}"
        ):
            k_core(_log(rows), user_min, item_min)
        return
    core = k_core(_log(rows), user_min, item_min)
    assert core.rows() == expected
    assert_frame_equal(k_core(core, user_min, item_min), core)


def test_a_k_core_that_takes_many_rounds() -> None:
    # A chain: user i has the items i and i + 1, so dropping the lonely item 0 drops all, one after the other.
    chain: list[Event] = [(i, i + step, 0) for i in range(60) for step in (0, 1)]
    core: list[Event] = [(user, item, 0) for user in (100, 101) for item in (100, 101)]
    assert k_core(_log(chain + core), 2, 2).rows() == core


@settings(deadline=None)
@given(events)
def test_order_is_a_stable_sort_by_time_within_users_by_their_first_line(rows: list[Event]) -> None:
    firsts = list(dict.fromkeys(user for user, _, _ in rows))
    expected = sorted(rows, key=lambda row: (firsts.index(row[0]), row[2]))
    assert order(_log(rows)).rows() == expected


def test_without_timestamps_the_order_of_the_file_counts() -> None:
    rows: list[Event] = [("b", 3, None), ("a", 2, None), ("b", 1, None), ("a", 2, None)]
    assert order(_log(rows)).rows() == [rows[0], rows[2], rows[1], rows[3]]


def test_some_timestamps_are_refused() -> None:
    with pytest.raises(DataError, match="timestamp: expected one for every event or for none, got 1 of 2 missing"):
        order(_log([(1, 1, 5), (1, 2, None)]))


@settings(deadline=None)
@given(events, st.booleans())
def test_a_data_set_holds_the_events_of_the_log(rows: list[Event], named: bool) -> None:
    if named:
        rows = [(f"u{user}", f"i{item}", when) for user, item, when in rows]
    dataset = SequenceDataset.from_log(_log(rows))
    assert dataset.vocab.items == sorted({item for _, item, _ in rows})
    expected: dict[Any, list[Any]] = {}
    for user, item, _ in sorted(rows, key=lambda row: row[2] or 0):
        expected.setdefault(user, []).append(item)
    assert _own_ids(dataset) == expected
    assert dataset.users == list(dict.fromkeys(user for user, _, _ in rows))
    assert dataset.items.dtype == dataset.offsets.dtype == torch.int64
    assert int(dataset.items.min()) >= 1
    assert int(dataset.items.max()) == dataset.n_items


def test_titles_and_a_given_vocabulary() -> None:
    log = _log([("u", "b", 1), ("u", "a", 2), ("u", "d", 3)])
    items = pl.DataFrame({"item": ["a", "b", "a", "c"], "title": ["first", "Bee", "second", None]})
    dataset = SequenceDataset.from_log(log, items)
    assert dataset.vocab == Vocabulary(["a", "b", "d"], ["first", "Bee", ""])
    assert SequenceDataset.from_log(log, items.with_columns(item=pl.Series([1, 2, 3, 4]))).vocab.titles is None
    given_vocab = Vocabulary(["d", "c", "b", "a"])
    assert SequenceDataset.from_log(log, vocab=given_vocab).items.tolist() == [3, 4, 1]
    with pytest.raises(DataError, match="item: expected ids of the given vocabulary, got 'd'"):
        SequenceDataset.from_log(log, vocab=Vocabulary(["a", "b"]))
    with pytest.raises(DataError, match="item: expected ids of type Int64, got String"):
        SequenceDataset.from_log(log, vocab=Vocabulary([1, 2]))


def test_statistics() -> None:
    rows: list[Event] = [(1, 7, 0), (1, 8, 1), (1, 9, 2), (2, 7, 0), (3, 7, 0)]
    assert SequenceDataset.from_log(_log(rows)).statistics() == {
        "users": 3, "items": 3, "events": 5, "mean_length": 1.67, "median_length": 1, "density": round(5 / 9, 6)
    }  # fmt: skip


@settings(deadline=None)
@given(events, events)
def test_the_fingerprint_tells_data_sets_apart(one: list[Event], other: list[Event]) -> None:
    first, second = SequenceDataset.from_log(_log(one)), SequenceDataset.from_log(_log(other))
    assume(list(_own_ids(first).values()) != list(_own_ids(second).values()))
    assert first.fingerprint() != second.fingerprint()
    assert first.fingerprint() == SequenceDataset.from_log(_log(one)).fingerprint()


def _saved(folder: Path) -> SequenceDataset:
    dataset = SequenceDataset.from_log(
        _log([("ü", "b", 1), ("ü", "a", 2), ("w", "b", 1)]),
        pl.DataFrame({"item": ["a", "b"], "title": ["Ä", "\u2028"]}),
    )
    dataset.save(folder)
    return dataset


def test_a_saved_data_set_comes_back(tmp_path: Path) -> None:
    dataset = _saved(tmp_path / "new")
    loaded = SequenceDataset.load(tmp_path / "new")
    assert torch.equal(loaded.items, dataset.items)
    assert torch.equal(loaded.offsets, dataset.offsets)
    assert loaded.users == dataset.users == ["ü", "w"]
    assert loaded.vocab == dataset.vocab
    assert loaded.fingerprint() == dataset.fingerprint()


@pytest.mark.parametrize("name", ["sequences.safetensors", "users.json", "vocab.json"])
def test_a_missing_or_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    _saved(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-3])
    with pytest.raises(StorageError, match=name):
        SequenceDataset.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(StorageError, match=f"cannot read .*{name}"):
        SequenceDataset.load(tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    dataset = _saved(tmp_path)
    tensors, labels = load_tensors(tmp_path / "sequences.safetensors")
    strangers = "do not belong together"
    for users in (["ü"], ["w", "ü"]):
        write_json(tmp_path / "users.json", users)
        with pytest.raises(StorageError, match=strangers):
            SequenceDataset.load(tmp_path)
    write_json(tmp_path / "users.json", {"ü": 0, "w": 1})
    with pytest.raises(StorageError, match="users.json: expected a list, got dict"):
        SequenceDataset.load(tmp_path)
    dataset.save(tmp_path)
    Vocabulary(["b", "a"]).save(tmp_path / "vocab.json")
    with pytest.raises(StorageError, match=strangers):
        SequenceDataset.load(tmp_path)
    dataset.save(tmp_path)
    save_tensors(tmp_path / "sequences.safetensors", {**tensors, "items": tensors["items"].roll(1)}, labels)
    with pytest.raises(StorageError, match=strangers):
        SequenceDataset.load(tmp_path)
    save_tensors(tmp_path / "sequences.safetensors", {"items": tensors["items"]}, labels)
    with pytest.raises(StorageError, match="sequences.safetensors: expected items and offsets, got items"):
        SequenceDataset.load(tmp_path)
