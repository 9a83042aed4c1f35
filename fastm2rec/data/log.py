"""From a log to sequences: k-core, order in time, dense ids, one flat tensor of events.

**Ties.** Events of a user are ordered by timestamp; equal timestamps keep the order of the file. MovieLens has many of
them (whole pages of ratings share a second), so leave-one-out targets depend on this rule.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..storage import PathLike, StorageError, load_tensors, read_json, save_tensors, write_json
from ..vocab import ItemId, Vocabulary
from ._polars import pl
from .files import DataError

SEQUENCES_FILE = "sequences.safetensors"
USERS_FILE = "users.json"
VOCAB_FILE = "vocab.json"


def k_core(log: pl.DataFrame, user_min: int = 5, item_min: int = 5) -> pl.DataFrame:
    """Drop users and items with fewer than so many events, again and again until none is left to drop.

    Raises:
        DataError: nothing is left.
    """
    kept = log
    while True:
        smaller = kept.filter(pl.len().over("item") >= item_min).filter(pl.len().over("user") >= user_min)
        if len(smaller) == len(kept):
            break
        kept = smaller
    if kept.is_empty():
        raise DataError(f"no user with {user_min} and item with {item_min} events is left of {len(log):,} events")
    return kept


def order(log: pl.DataFrame) -> pl.DataFrame:
    """Sort by user (in the order of their first line), then timestamp; ties stay in the order of the file.

    Raises:
        DataError: some timestamps are missing and some are not.
    """
    missing = log["timestamp"].null_count()
    if 0 < missing < len(log):
        raise DataError(f"timestamp: expected one for every event or for none, got {missing:,} of {len(log):,} missing")
    numbered = log.with_row_index("_row").with_columns(pl.col("_row").min().over("user").alias("_user"))
    return numbered.sort("_user", "timestamp", "_row").drop("_user", "_row")


@dataclass(frozen=True)
class SequenceDataset:
    """Every user's items in time order, one after the other.

    Args:
        items: [n_events] int64, dense item ids 1..n_items.
        offsets: [n_users + 1] int64; user i's events are items[offsets[i] : offsets[i + 1]].
        users: the users' own ids.
        vocab: the items' own ids, and their titles where known.
    """

    items: Tensor
    offsets: Tensor
    users: list[ItemId]
    vocab: Vocabulary

    @classmethod
    def from_log(
        cls, log: pl.DataFrame, items: pl.DataFrame | None = None, vocab: Vocabulary | None = None
    ) -> SequenceDataset:
        """Order a log and number its items.

        Args:
            log: columns `user`, `item`, `timestamp`, as `read_log` gives them.
            items: an item table, for the titles.
            vocab: number the items like this; by default in ascending order of their ids.

        Raises:
            DataError: missing timestamps, or an item that `vocab` does not hold.
        """
        ordered = order(log)
        if vocab is None:
            ids = ordered["item"].unique().sort()
            vocab = Vocabulary(ids.to_list(), _titles(ids, items))
        table = pl.DataFrame({"item": vocab.items, "dense": range(1, len(vocab) + 1)})
        if table["item"].dtype != ordered["item"].dtype:
            raise DataError(f"item: expected ids of type {table['item'].dtype}, got {ordered['item'].dtype}")
        dense = ordered.select("item").join(table, on="item", how="left", maintain_order="left")["dense"]
        if dense.null_count():
            stranger = ordered["item"].filter(dense.is_null())[0]
            raise DataError(f"item: expected ids of the given vocabulary, got {stranger!r}")
        counts = ordered.group_by("user", maintain_order=True).len()
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
        offsets[1:] = torch.from_numpy(counts["len"].cast(pl.Int64).to_numpy().copy()).cumsum(0)
        return cls(torch.from_numpy(dense.to_numpy().copy()), offsets, counts["user"].to_list(), vocab)

    @property
    def n_users(self) -> int:
        return len(self.users)

    @property
    def n_items(self) -> int:
        return len(self.vocab)

    def sequence(self, user: int) -> Tensor:
        """The dense items of the user at this place in `users`, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def statistics(self) -> dict[str, float]:
        """Counts, and the mean and median length of a user's sequence."""
        lengths = self.offsets.diff()
        return {
            "users": self.n_users,
            "items": self.n_items,
            "events": len(self.items),
            "mean_length": round(float(lengths.double().mean()), 2),
            "median_length": int(lengths.median()),
            "density": round(len(self.items) / (self.n_users * self.n_items), 6),
        }

    def fingerprint(self) -> str:
        """A digest of the events and of the item ids; a run refuses to go on with other data."""
        return _digest(self.items.numpy().tobytes(), self.offsets.numpy().tobytes(), repr(self.vocab.items).encode())

    def save(self, folder: PathLike) -> None:
        """Write the data set to a folder that `load` reads.

        Raises:
            StorageError: the folder cannot be written.
        """
        folder = Path(folder)
        self.vocab.save(folder / VOCAB_FILE)
        write_json(folder / USERS_FILE, self.users)
        tensors = {"items": self.items, "offsets": self.offsets}
        save_tensors(folder / SEQUENCES_FILE, tensors, self._labels())

    def _labels(self) -> dict[str, str]:
        """What the file of the events says about itself and the files beside it."""
        return {"fingerprint": self.fingerprint(), "users": _digest(repr(self.users).encode())}

    @classmethod
    def load(cls, folder: PathLike) -> SequenceDataset:
        """Read a data set that `save` wrote.

        Raises:
            StorageError: a file is missing, truncated, or does not belong to the others.
        """
        folder = Path(folder)
        tensors, metadata = load_tensors(folder / SEQUENCES_FILE)
        if tensors.keys() != {"items", "offsets"}:
            raise StorageError(f"{folder / SEQUENCES_FILE}: expected items and offsets, got {', '.join(tensors)}")
        users = read_json(folder / USERS_FILE)
        if not isinstance(users, list):
            raise StorageError(f"{folder / USERS_FILE}: expected a list, got {type(users).__name__}")
        dataset = cls(tensors["items"], tensors["offsets"], users, Vocabulary.load(folder / VOCAB_FILE))
        if dataset._labels() != metadata:
            raise StorageError(f"{folder}: {SEQUENCES_FILE}, {USERS_FILE} and {VOCAB_FILE} do not belong together")
        return dataset


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _titles(ids: pl.Series, items: pl.DataFrame | None) -> list[str] | None:
    """The titles of `ids`, "" where one is unknown; None where all are."""
    if items is None or items["item"].dtype != ids.dtype:
        return None
    known = items.select("item", "title").unique("item", keep="first", maintain_order=True)
    titles = ids.to_frame("item").join(known, on="item", how="left", maintain_order="left")["title"]
    return None if titles.null_count() == len(titles) else titles.fill_null("").to_list()
