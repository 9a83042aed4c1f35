"""Item ids as the user knows them, and the dense ids 1..n_items that the models count in (0 is padding)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from .storage import PathLike, StorageError, read_json, write_json

ItemId: TypeAlias = int | str
Unknown: TypeAlias = Literal["error", "skip"]


class UnknownItemError(KeyError):
    """An item id that the vocabulary does not hold."""

    def __str__(self) -> str:  # KeyError would print the repr of its message
        return str(self.args[0])


class Vocabulary:
    """A two-way table between a catalogue's own ids and dense ids: `items[i]` is dense id `i + 1`.

    Args:
        items: distinct ids, all `int` or all `str`.
        titles: optional human-readable names, one per item.

    Raises:
        ValueError: ids of mixed types or repeated ids, or a number of titles that is not the number of items.
    """

    def __init__(self, items: Sequence[ItemId], titles: Sequence[str] | None = None) -> None:
        kinds = {type(item) for item in items}
        if not kinds <= {int} and not kinds <= {str}:
            raise ValueError(
                f"items: expected all int or all str, got {', '.join(sorted(kind.__name__ for kind in kinds))}"
            )
        self.items: list[ItemId] = list(items)
        self._dense = {item: dense for dense, item in enumerate(self.items, start=1)}
        if len(self._dense) != len(self.items):
            seen: set[ItemId] = set()
            repeated = next(item for item in self.items if item in seen or seen.add(item))  # type: ignore[func-returns-value]
            raise ValueError(f"items: expected distinct ids, got {repeated!r} more than once")
        if titles is not None and len(titles) != len(self.items):
            raise ValueError(f"titles: expected one per item ({len(self.items)}), got {len(titles)}")
        self.titles: list[str] | None = None if titles is None else [str(title) for title in titles]

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, item: object) -> bool:
        return item in self._dense

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.items == other.items and self.titles == other.titles

    __hash__ = None  # type: ignore[assignment]

    @property
    def kind(self) -> type:
        """`int` or `str`: the type of this catalogue's ids."""
        return type(self.items[0]) if self.items else int

    def _lookup(self, item: object) -> int | None:
        if self.kind is int and not isinstance(item, str | bool):
            try:  # numpy's and torch's integers count as integers; floats do not
                item = operator.index(item)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                return None
        return self._dense.get(item) if isinstance(item, int | str) and not isinstance(item, bool) else None

    def encode(self, items: Iterable[object], unknown: Unknown = "error") -> list[int]:
        """The dense ids of `items`, in order.

        Args:
            items: ids as the user knows them; numpy and torch integers count as `int`.
            unknown: "error" raises on an id that is not in the catalogue, "skip" leaves it out.

        Raises:
            UnknownItemError: an unknown id, with its place, and a hint if only its type is wrong.
            ValueError: `unknown` is neither of the two words.
        """
        if unknown not in ("error", "skip"):
            raise ValueError(f"unknown: expected 'error' or 'skip', got {unknown!r}")
        items = list(items)
        if set(map(type, items)) == {self.kind}:  # the common case, several times as fast
            known = list(map(self._dense.get, items))  # type: ignore[arg-type]
            if None not in known:
                return known  # type: ignore[return-value]
        dense: list[int] = []
        for place, item in enumerate(items):
            found = self._lookup(item)
            if found is not None:
                dense.append(found)
            elif unknown == "error":
                raise UnknownItemError(self._explain(item, place))
        return dense

    def _explain(self, item: object, place: int) -> str:
        message = f"unknown item id {item!r} at position {place}; the catalogue holds {len(self)} ids"
        if self.items:
            message += f" of type {self.kind.__name__}, such as {self.items[0]!r}"
        twin: ItemId | None = str(item)
        if self.kind is int:
            twin = int(item) if isinstance(item, str) and item.strip().lstrip("-").isdecimal() else None
        if twin is not None and twin in self._dense:
            message += f"; did you mean {twin!r}?"
        return message

    def decode(self, dense: Iterable[int]) -> list[ItemId]:
        """The user's ids of dense ids 1..len(self).

        Raises:
            IndexError: a dense id outside that range (0 is padding, not an item).
        """
        ids = list(dense)
        for number in ids:
            if not 1 <= number <= len(self.items):
                raise IndexError(f"dense item id {number} is outside 1..{len(self.items)}")
        return [self.items[number - 1] for number in ids]

    def title(self, item: ItemId) -> str | None:
        """The title of the user's id `item`, or None where the catalogue has no titles."""
        return None if self.titles is None else self.titles[self.encode([item])[0] - 1]

    def save(self, path: PathLike) -> None:
        """Write the table as JSON, whole or not at all."""
        write_json(path, {"items": self.items, "titles": self.titles})

    @classmethod
    def load(cls, path: PathLike) -> Vocabulary:
        """Read a table written by `save`.

        Raises:
            StorageError: the file is absent, not JSON, or does not hold a vocabulary.
        """
        value = read_json(path)
        try:
            return cls(value["items"], value["titles"])
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{path} does not hold a vocabulary: {error}") from error
