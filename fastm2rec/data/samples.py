"""Training and evaluation samples, cut from the flat event tensor when a batch asks for them.

Leave-one-out: a user's last item is the test target, the one before it the validation target, all earlier ones are for
training. A training sample is a prefix and the item that follows it, so appending later events to a log changes no
sample that was made from earlier ones. Users with fewer than three events have no validation and test target; all their
events are for training.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .log import SequenceDataset

Split = Literal["train", "valid", "test"]
HELD_OUT = 2  # one item for validation, one for the test
LEAST = HELD_OUT + 1  # events that a user needs to be evaluated


class Batch(NamedTuple):
    """Histories and what came next.

    Args:
        item_ids: [B, L] int64, right-padded with 0.
        lengths: [B] int64, 1 to L.
        targets: [B] int64, the items that followed.
        users: [B] int64, places in the data set's `users`.
    """

    item_ids: Tensor
    lengths: Tensor
    targets: Tensor
    users: Tensor


class Sequences(NamedTuple):
    """Whole training sequences: item_ids [B, L] right-padded with 0, lengths [B], users [B]."""

    item_ids: Tensor
    lengths: Tensor
    users: Tensor


class PrefixSamples:
    """One sample per target: the up to `max_len` items before it.

    Only the targets' places are stored (8 bytes each); histories are gathered per batch.

    Args:
        dataset: where the events are.
        max_len: L, items of history that are read.
        split: "train" for every prefix of the training part, "valid" or "test" for one sample per user.
        prefixes_per_user: so many random training prefixes of each user per epoch; None takes all of them.

    Raises:
        ValueError: an unknown split, a max_len or prefixes_per_user below 1, or no sample at all.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        max_len: int,
        split: Split = "train",
        prefixes_per_user: int | None = None,
    ) -> None:
        if split not in ("train", "valid", "test"):
            raise ValueError(f"split: expected 'train', 'valid' or 'test', got {split!r}")
        if max_len < 1:
            raise ValueError(f"max_len: expected at least 1, got {max_len}")
        if prefixes_per_user is not None and prefixes_per_user < 1:
            raise ValueError(f"prefixes_per_user: expected None or at least 1, got {prefixes_per_user}")
        self.dataset = dataset
        self.max_len = max_len
        self.split = split
        self.prefixes_per_user = prefixes_per_user
        starts, ends = dataset.offsets[:-1], dataset.offsets[1:]
        evaluated = ends - starts >= LEAST
        if split == "train":
            training_ends = training_part(dataset)
            counts = (training_ends - starts - 1).clamp(min=0)
            self.user_of = torch.repeat_interleave(torch.arange(dataset.n_users), counts)
            first = starts + 1 - (counts.cumsum(0) - counts)  # place of a user's first target, less its sample's number
            self.targets = first[self.user_of] + torch.arange(int(counts.sum()))
        else:
            self.user_of = evaluated.nonzero().squeeze(1)
            self.targets = ends[self.user_of] - (1 if split == "test" else 2)
        if not len(self.targets):
            raise ValueError(f"split: expected at least one {split} sample, got none: every user has too few events")

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def samples_per_epoch(self) -> int:
        """How many indices `epoch_indices` returns."""
        if self.prefixes_per_user is None:
            return len(self)
        return int(torch.bincount(self.user_of).clamp(max=self.prefixes_per_user).sum())

    def epoch_indices(self, epoch: int, seed: int) -> Tensor:
        """The samples of an epoch in random order, [samples_per_epoch]; a function of (seed, epoch) alone."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        shuffled = torch.randperm(len(self), generator=generator)
        if self.prefixes_per_user is None:
            return shuffled
        # Each user's samples in random order side by side; the first few of each are taken.
        users, by_user = self.user_of[shuffled].sort(stable=True)
        first = torch.searchsorted(users, users)
        taken = torch.arange(len(users)) - first < self.prefixes_per_user
        chosen = shuffled[by_user[taken]]
        return chosen[torch.randperm(len(chosen), generator=generator)]

    def batch(self, indices: Tensor, trim: bool = True) -> Batch:
        """The samples at `indices` [B] int64; with `trim` as wide as their longest history, else max_len wide."""
        targets, users = self.targets[indices], self.user_of[indices]
        lengths = (targets - self.dataset.offsets[users]).clamp(max=self.max_len)
        item_ids = _gather(self.dataset.items, targets - lengths, lengths, None if trim else self.max_len)
        return Batch(item_ids, lengths, self.dataset.items[targets], users)

    def history(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """All items before each target, also beyond max_len: flat [n] and offsets [B + 1]."""
        targets, users = self.targets[indices], self.user_of[indices]
        starts = self.dataset.offsets[users]
        lengths = targets - starts
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        row = torch.repeat_interleave(torch.arange(len(indices)), lengths)
        flat = starts[row] + torch.arange(int(offsets[-1])) - offsets[row]
        return self.dataset.items[flat], offsets


class SequenceSamples:
    """One sample per user: the last `max_len` items of the training part, for losses at every position or at masks.

    Args:
        dataset: where the events are.
        max_len: how many items at most.
        least: users with fewer training items are left out.

    Raises:
        ValueError: a max_len below 1, or no user with enough items.
    """

    def __init__(self, dataset: SequenceDataset, max_len: int, least: int = 2) -> None:
        if max_len < 1:
            raise ValueError(f"max_len: expected at least 1, got {max_len}")
        self.dataset = dataset
        self.max_len = max_len
        self.ends = training_part(dataset)
        self.user_of = (self.ends - dataset.offsets[:-1] >= least).nonzero().squeeze(1)
        if not len(self.user_of):
            raise ValueError(f"dataset: expected a user with at least {least} training items, got none")

    def __len__(self) -> int:
        return len(self.user_of)

    @property
    def samples_per_epoch(self) -> int:
        """How many indices `epoch_indices` returns."""
        return len(self)

    def epoch_indices(self, epoch: int, seed: int) -> Tensor:
        """All samples in random order; a function of (seed, epoch) alone."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(len(self), generator=generator)

    def batch(self, indices: Tensor) -> Sequences:
        """The sequences of the samples at `indices` [B] int64."""
        users = self.user_of[indices]
        lengths = (self.ends[users] - self.dataset.offsets[users]).clamp(max=self.max_len)
        return Sequences(_gather(self.dataset.items, self.ends[users] - lengths, lengths, None), lengths, users)


def training_part(dataset: SequenceDataset) -> Tensor:
    """Where each user's training events end, [n_users]: two before the end, or at it for users with too few events."""
    starts, ends = dataset.offsets[:-1], dataset.offsets[1:]
    return torch.where(ends - starts >= LEAST, ends - HELD_OUT, ends)


def _gather(items: Tensor, starts: Tensor, lengths: Tensor, width: int | None) -> Tensor:
    """items[starts[b] : starts[b] + lengths[b]] as rows of a tensor padded with 0 on the right."""
    if width is None:
        width = int(lengths.max()) if len(lengths) else 1
    slots = torch.arange(width)
    places = (starts[:, None] + slots).clamp(max=len(items) - 1)
    return items[places].masked_fill(slots >= lengths[:, None], 0)
