"""The items that the service knows: which ids are among them, what they are called, and how a person finds them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

from ..vocab import ItemId, Vocabulary


class HistoryError(ValueError):
    """A history that the service was told to refuse."""


class Catalogue:
    """Look-ups over a vocabulary.

    Args:
        vocab: the catalogue's ids; None where the model has dense ids 1..n_items only.
        n_items: size of the catalogue.
    """

    def __init__(self, vocab: Vocabulary | None, n_items: int) -> None:
        self.vocab = vocab if vocab is not None else Vocabulary(range(1, n_items + 1))
        self._ids = [str(item).casefold() for item in self.vocab.items]
        self._titles = self.vocab.titles or []
        self._folded = [_fold(title) for title in self._titles]

    @property
    def has_titles(self) -> bool:
        return bool(self._titles)

    def title(self, item: ItemId) -> str | None:
        return self.vocab.title(item)

    def check(
        self,
        history: Sequence[ItemId],
        name: str,
        unknown: Literal["error", "skip"],
        empty: Literal["error", "popular"],
    ) -> None:
        """Refuse what the model would refuse, before it shares a batch with other people's histories.

        Raises:
            HistoryError: an unknown id with `unknown="error"`, or no known item with `empty="error"`; the message
                begins with `name`.
        """
        if unknown == "error" and not all(item in self.vocab for item in history):
            try:
                self.vocab.encode(history)
            except KeyError as error:
                raise HistoryError(f"{name}: {error}") from None
        if empty == "error" and not any(item in self.vocab for item in history):
            what = f"none of its {len(history)} ids is in the catalogue" if history else "it is empty"
            raise HistoryError(f"{name}: expected at least one known item, but {what}")

    def search(self, query: str, limit: int) -> list[dict[str, ItemId | str | None]]:
        """Items whose id or title contains `query`, best matches first; case and accents do not matter.

        The order: the id itself, titles that begin so, titles with a word that begins so, other titles, ids that
        begin so; within each, the catalogue's.
        """
        wanted = _fold(query.strip())
        if not wanted:
            return [self._entry(place) for place in range(min(limit, len(self._ids)))]
        spaced = f" {wanted}"
        ranked: list[list[int]] = [[], [], [], [], []]
        for place, name in enumerate(self._ids):
            title = self._folded[place] if self._folded else ""
            if wanted == name:
                ranked[0].append(place)
            elif wanted in title:
                ranked[1 if title.startswith(wanted) else 2 if spaced in title else 3].append(place)
            elif name.startswith(wanted):
                ranked[4].append(place)
            if len(ranked[0]) + len(ranked[1]) >= limit and ranked[0]:
                break
        places = [place for group in ranked for place in group][:limit]
        return [self._entry(place) for place in places]

    def _entry(self, place: int) -> dict[str, ItemId | str | None]:
        return {"item": self.vocab.items[place], "title": self._titles[place] if self._titles else None}


def _fold(text: str) -> str:
    """`text` as it is compared: without case, without accents."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return text.casefold()
