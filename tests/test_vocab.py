"""The table between a catalogue's own ids and dense ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastm2rec import StorageError, UnknownItemError, Vocabulary

ids = st.one_of(
    st.lists(st.integers(), unique=True, min_size=1), st.lists(st.text(), unique=True, min_size=1)
)  # fmt: skip


@given(ids)
def test_encode_and_decode_are_inverse(items: list[int] | list[str]) -> None:
    vocab = Vocabulary(items)
    dense = vocab.encode(items)
    assert dense == list(range(1, len(items) + 1))
    assert vocab.decode(dense) == items


def test_numpy_and_torch_integers_are_integers() -> None:
    vocab = Vocabulary([10, 20])
    assert vocab.encode([np.int64(20), torch.tensor(10)]) == [2, 1]
    for stranger in (10.0, True, None, np.float32(10)):
        with pytest.raises(UnknownItemError):
            vocab.encode([stranger])


def test_an_unknown_id_is_named_with_a_hint() -> None:
    with pytest.raises(UnknownItemError, match=r"unknown item id '20' at position 1; .*type int.*did you mean 20\?"):
        Vocabulary([10, 20]).encode([10, "20"])
    with pytest.raises(UnknownItemError, match=r"did you mean 'B01'|did you mean '7'"):
        Vocabulary(["7"]).encode([7])
    assert Vocabulary([10, 20]).encode([10, 30, 20], unknown="skip") == [1, 2]
    with pytest.raises(ValueError, match="unknown: expected 'error' or 'skip', got 'ignore'"):
        Vocabulary([1]).encode([1], unknown="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("items", "titles", "message"),
    [
        ([1, "1"], None, "all int or all str, got int, str"),
        ([1, 2, 1], None, "distinct ids, got 1 more than once"),
        ([1, 2], ["one"], r"one per item \(2\), got 1"),
        ([True, False], None, "all int or all str"),
    ],
)
def test_a_table_that_is_no_table(items: list[int], titles: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vocabulary(items, titles)


def test_padding_cannot_be_decoded() -> None:
    with pytest.raises(IndexError, match=r"0 is outside 1\.\.2"):
        Vocabulary([5, 6]).decode([1, 0])


def test_titles_and_files(tmp_path: Path) -> None:
    vocab = Vocabulary(["a", "é"], ["Amélie", "\u2028"])
    vocab.save(tmp_path / "vocab.json")
    assert Vocabulary.load(tmp_path / "vocab.json") == vocab
    assert vocab.title("a") == "Amélie"
    assert Vocabulary([1]).title(1) is None
    (tmp_path / "vocab.json").write_text('{"items": [1, 1], "titles": null}')
    with pytest.raises(StorageError, match=r"vocab.json does not hold a vocabulary.*more than once"):
        Vocabulary.load(tmp_path / "vocab.json")
