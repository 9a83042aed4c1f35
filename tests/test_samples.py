"""Samples are what a naive comprehension says, cost O(events) memory, and never change when a log grows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastm2rec.data import PrefixSamples, SequenceDataset, SequenceSamples
from fastm2rec.data.samples import training_part

Event = tuple[int, int, int]

sequences = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=6)
max_lens = st.integers(1, 6)


def _log(rows: list[Event]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"user": pl.Int64, "item": pl.Int64, "timestamp": pl.Int64}, orient="row")


def _dataset(users: list[list[int]]) -> SequenceDataset:
    return SequenceDataset.from_log(
        _log([(u, item, t) for u, items in enumerate(users) for t, item in enumerate(items)])
    )


def _rows(dataset: SequenceDataset, item_ids: Tensor, lengths: Tensor) -> list[list[Any]]:
    """The rows without their padding, in the ids of the log; what is padded must be zero."""
    rows = []
    for row, length in zip(item_ids, lengths.tolist(), strict=True):
        assert not row[length:].any()
        rows.append(dataset.vocab.decode(row[:length].tolist()))
    return rows


def _samples(samples: PrefixSamples, indices: Tensor | None = None) -> list[tuple[Any, list[Any], Any]]:
    """(user, history, target) of the samples at these indices, by default of all of them."""
    batch = samples.batch(torch.arange(len(samples)) if indices is None else indices)
    dataset = samples.dataset
    users = [dataset.users[place] for place in batch.users.tolist()]
    histories = _rows(dataset, batch.item_ids, batch.lengths)
    return list(zip(users, histories, dataset.vocab.decode(batch.targets.tolist()), strict=True))


@settings(deadline=None)
@given(sequences, max_lens)
def test_prefixes_are_those_of_a_comprehension(users: list[list[int]], max_len: int) -> None:
    dataset = _dataset(users)
    training = [items[:-2] if len(items) >= 3 else items for items in users]
    held_out = [(user, items) for user, items in enumerate(users) if len(items) >= 3]
    expected = {
        "train": [
            (user, items[:place][-max_len:], items[place])
            for user, items in enumerate(training)
            for place in range(1, len(items))
        ],
        "valid": [(user, items[:-2][-max_len:], items[-2]) for user, items in held_out],
        "test": [(user, items[:-1][-max_len:], items[-1]) for user, items in held_out],
    }
    for split, samples in expected.items():
        if samples:
            made = PrefixSamples(dataset, max_len, split)  # type: ignore[arg-type]
            assert len(made) == made.samples_per_epoch == len(samples)
            assert _samples(made) == samples
        else:
            with pytest.raises(ValueError, match=f"split: expected at least one {split} sample, got none"):
                PrefixSamples(dataset, max_len, split)  # type: ignore[arg-type]
    assert training_part(dataset).tolist() == [
        start + len(items) for start, items in zip(dataset.offsets.tolist(), training, strict=False)
    ]


@settings(deadline=None)
@given(sequences, max_lens, st.integers(1, 4), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_has_so_many_different_prefixes_of_each_user(
    users: list[list[int]], max_len: int, each: int, seed: int, epoch: int
) -> None:
    dataset = _dataset(users)
    assume(any(len(items) >= 4 or len(items) == 2 for items in users))
    every = PrefixSamples(dataset, max_len)
    assert sorted(every.epoch_indices(epoch, seed).tolist()) == list(range(len(every)))
    some = PrefixSamples(dataset, max_len, prefixes_per_user=each)
    chosen = some.epoch_indices(epoch, seed)
    assert len(chosen) == some.samples_per_epoch
    assert len(set(chosen.tolist())) == len(chosen)
    taken = torch.bincount(some.user_of[chosen], minlength=dataset.n_users)
    assert taken.tolist() == torch.bincount(every.user_of, minlength=dataset.n_users).clamp(max=each).tolist()


@pytest.mark.parametrize("each", [None, 3])
def test_an_epoch_is_a_function_of_seed_and_epoch(each: int | None) -> None:
    users = [list(range(1, 30)) for _ in range(5)]
    orders = {}
    for seed in (0, 1, 7):
        for epoch in (0, 1, 2):
            samples = PrefixSamples(_dataset(users), 4, prefixes_per_user=each)
            torch.manual_seed(seed + epoch)
            torch.rand(epoch)  # neither the state of the global generator nor what was drawn before counts
            samples.epoch_indices(5, 5)
            orders[seed, epoch] = tuple(samples.epoch_indices(epoch, seed).tolist())
            assert orders[seed, epoch] == tuple(
                PrefixSamples(_dataset(users), 4, prefixes_per_user=each).epoch_indices(epoch, seed).tolist()
            )
    assert len(set(orders.values())) == len(orders)


def test_random_prefixes_reach_every_sample() -> None:
    samples = PrefixSamples(_dataset([list(range(1, 10)), list(range(1, 5))]), 4, prefixes_per_user=1)
    seen = {index for epoch in range(200) for index in samples.epoch_indices(epoch, 0).tolist()}
    # A sample is one of six of its user: missing it 200 times has probability (5/6)^200 < 1e-15.
    assert seen == set(range(len(samples)))


@settings(deadline=None)
@given(sequences, max_lens, st.data())
def test_any_batch_in_any_order(users: list[list[int]], max_len: int, data: st.DataObject) -> None:
    assume(any(len(items) >= 4 for items in users))
    samples = PrefixSamples(_dataset(users), max_len)
    indices = torch.tensor(data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=9)))
    every = _samples(samples)
    assert _samples(samples, indices) == [every[index] for index in indices.tolist()]
    tight, wide = samples.batch(indices), samples.batch(indices, trim=False)
    assert tight.item_ids.shape[1] == int(tight.lengths.max())
    assert wide.item_ids.shape == (len(indices), max_len)
    assert torch.equal(wide.item_ids[:, : tight.item_ids.shape[1]], tight.item_ids)
    assert not wide.item_ids[:, tight.item_ids.shape[1] :].any()
    items, offsets = samples.history(indices)
    whole = [items[start:stop].tolist() for start, stop in pairwise(offsets.tolist())]
    dataset = samples.dataset
    for past, user, target in zip(whole, samples.user_of[indices], samples.targets[indices], strict=True):
        assert past == dataset.items[dataset.offsets[user] : target].tolist()
    assert [past[-max_len:] for past in whole] == [
        row[:length].tolist() for row, length in zip(tight.item_ids, tight.lengths, strict=True)
    ]


old_events = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=30)
new_events = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(9, 15)), min_size=1, max_size=20)


def _by_event(samples: PrefixSamples) -> dict[tuple[Any, int], tuple[list[Any], Any]]:
    """History and target of every sample, by its user and the target's place in that user's sequence."""
    places = (samples.targets - samples.dataset.offsets[samples.user_of]).tolist()
    made = _samples(samples)
    return {(user, place): (past, target) for (user, past, target), place in zip(made, places, strict=True)}


@settings(deadline=None, max_examples=100)
@given(old_events, new_events, max_lens)
def test_later_events_change_no_earlier_sample(old: list[Event], new: list[Event], max_len: int) -> None:
    """From the log on: new events (also of new users, of new items, and as late as the last old one) are appended.

    What was held out moves on with them: the old validation and test items become training targets. The old training
    samples stay as they were, item by item, in the ids of the log. A user who had too few events to be evaluated is
    the one exception to their number: with the third event, the second becomes a validation target.
    """
    before, after = SequenceDataset.from_log(_log(old)), SequenceDataset.from_log(_log(old + new))
    assert after.users[: before.n_users] == before.users
    assume(any(len(before.sequence(user)) not in (1, 3) for user in range(before.n_users)))
    assume(any(len(after.sequence(user)) not in (1, 3) for user in range(after.n_users)))
    earlier, later = _by_event(PrefixSamples(before, max_len)), _by_event(PrefixSamples(after, max_len))
    lengths = {user: len(before.sequence(place)) for place, user in enumerate(before.users)}
    for (user, place), sample in earlier.items():
        if lengths[user] >= 3:
            assert later[user, place] == sample
        else:
            assert later.get((user, place), sample) == sample
    # No history holds an event that is not older than its target.
    ordered: dict[int, list[int]] = {}
    for user, item, _ in sorted(old + new, key=lambda row: row[2]):
        ordered.setdefault(user, []).append(item)
    for (user, place), (past, target) in later.items():
        assert past == ordered[user][:place][-max_len:]
        assert target == ordered[user][place]


def test_what_was_held_out_moves_on() -> None:
    rows: list[Event] = [(1, item, item) for item in (1, 2, 3, 4, 5)]
    before, after = _dataset_of(rows), _dataset_of([*rows, (1, 6, 6)])
    assert _samples(PrefixSamples(before, 9)) == [(1, [1], 2), (1, [1, 2], 3)]
    assert _samples(PrefixSamples(after, 9)) == [(1, [1], 2), (1, [1, 2], 3), (1, [1, 2, 3], 4)]
    assert _samples(PrefixSamples(before, 9, "valid")) == [(1, [1, 2, 3], 4)]
    assert _samples(PrefixSamples(before, 9, "test")) == _samples(PrefixSamples(after, 9, "valid"))


def _dataset_of(rows: list[Event]) -> SequenceDataset:
    return SequenceDataset.from_log(_log(rows))


def test_memory_grows_with_the_events_and_not_with_the_samples_times_their_length() -> None:
    n_events, max_len = 2_000, 500
    dataset = _dataset([list(range(1, n_events + 1))])
    samples = PrefixSamples(dataset, max_len)
    held = [value for value in vars(samples).values() if isinstance(value, Tensor)]
    assert {value.untyped_storage().nbytes() for value in held} == {8 * len(samples)}
    assert len(held) == 2
    assert samples.dataset is dataset
    assert samples.batch(torch.tensor([0, len(samples) - 1])).item_ids.shape == (2, max_len)


@settings(deadline=None)
@given(sequences, max_lens, st.integers(1, 3))
def test_whole_sequences_are_the_last_items_of_the_training_part(
    users: list[list[int]], max_len: int, least: int
) -> None:
    dataset = _dataset(users)
    training = [items[:-2] if len(items) >= 3 else items for items in users]
    expected = [(user, items[-max_len:]) for user, items in enumerate(training) if len(items) >= least]
    if not expected:
        with pytest.raises(
            ValueError, match=f"dataset: expected a user with at least {least} training items, got none"
        ):
            SequenceSamples(dataset, max_len, least)
        return
    samples = SequenceSamples(dataset, max_len, least)
    assert len(samples) == samples.samples_per_epoch == len(expected)
    batch = samples.batch(torch.arange(len(samples)))
    rows = _rows(dataset, batch.item_ids, batch.lengths)
    assert [(dataset.users[place], row) for place, row in zip(batch.users.tolist(), rows, strict=True)] == expected
    shuffled = samples.epoch_indices(3, 1)
    assert sorted(shuffled.tolist()) == list(range(len(samples)))
    assert torch.equal(shuffled, SequenceSamples(dataset, max_len, least).epoch_indices(3, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split: expected 'train', 'valid' or 'test', got 'dev'"),
        ({"max_len": 0}, "max_len: expected at least 1, got 0"),
        ({"prefixes_per_user": 0}, "prefixes_per_user: expected None or at least 1, got 0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixSamples(_dataset([[1, 2, 3, 4]]), **{"max_len": 4, **options})


def test_wrong_arguments_of_whole_sequences() -> None:
    with pytest.raises(ValueError, match="max_len: expected at least 1, got 0"):
        SequenceSamples(_dataset([[1, 2, 3, 4]]), 0)
