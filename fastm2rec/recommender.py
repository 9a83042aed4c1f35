"""The model as a service holds it: frozen, folded where it can be, asked from many threads at once.

Nothing that changes is shared: a call makes its own tensors, so calls need no lock. A forked child computes on one
thread, as the threads that its parent's OpenMP had started do not exist in it, and waiting for them never ends.
"""

from __future__ import annotations

import copy
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, overload

import torch
from torch import Tensor, nn

from ._topk import top_k
from .base import Recommendation, SequentialRecommender, check_k, named, read_histories
from .folded import FoldedM2Rec
from .impl import AUTO, ImplementationError, chosen, resolve
from .model import M2Rec
from .storage import PathLike
from .vocab import Unknown, Vocabulary

if TYPE_CHECKING:
    from ._graphs import GraphedEncoder
    from .ann import ItemIndex

Empty: TypeAlias = Literal["error", "popular"]

# Histories that are encoded and scored at once.
_BATCH = 256


@dataclass(frozen=True)
class Recommendations(Sequence[Recommendation]):
    """The answer for one history: a sequence of `items`, best first.

    Args:
        items: what is recommended.
        skipped: ids of the history that are not in the catalogue and were left out.
        fallback: nothing was left of the history; these are the most popular items, their counts as scores.
    """

    items: list[Recommendation]
    skipped: int = 0
    fallback: bool = False

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, place: int) -> Recommendation: ...
    @overload
    def __getitem__(self, place: slice) -> list[Recommendation]: ...
    def __getitem__(self, place: int | slice) -> Recommendation | list[Recommendation]:
        return self.items[place]

    def __iter__(self) -> Iterator[Recommendation]:
        return iter(self.items)


class Recommender:
    """A trained model for answering: a copy without gradients or dropout, which later training does not change.

    A one-layer M2Rec is folded (`fastm2rec.folded`); any other model keeps its own `encode`. Threads may share one
    object, and it may be used before and after a fork (on the CPU).

    Args:
        model: the trained model.
        impl: which implementation runs; see `fastm2rec.impl.names()`.
        dtype: of the encoder, by default the model's; items are always scored in float32 at least.
        device: where to compute, by default where the model is.
        index: an approximate index of the items, which then answers; see `fastm2rec.ann`.

    Raises:
        ImplementationError: `impl` cannot run this model there.
        ValueError: an index of another catalogue.
    """

    def __init__(
        self,
        model: SequentialRecommender,
        *,
        impl: str = AUTO,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        index: ItemIndex | None = None,
    ) -> None:
        weight = model.item_weight.detach()
        self.device = torch.device(device if device is not None else weight.device)
        dtype = dtype or weight.dtype
        self.n_items, self.max_len = model.n_items, model.max_len
        self.vocab: Vocabulary | None = model.vocab
        self.popularity: Tensor | None = model.popularity
        self.item_weight = weight.to(self.device, torch.promote_types(dtype, torch.float32), copy=True)
        self._encode: Callable[[Tensor, Tensor], Tensor]
        self._encode_sound: Callable[[Tensor, Tensor], Tensor]  # without checks, which would take as long as the work
        self._graphs: GraphedEncoder | None = None
        if isinstance(model, M2Rec):
            impl = model.impl if impl == AUTO else impl
        if isinstance(model, M2Rec) and model.config.n_layers == 1:
            self.impl = chosen("encode_last", impl, self.device)
            folded = FoldedM2Rec(model, impl=self.impl).to(self.device, dtype)
            self._encode = folded.encode
            self._encode_sound = partial(resolve("encode_last", self.impl, self.device), folded=folded.folded)
            if self.device.type == "cuda" and self.impl != "reference":
                from ._graphs import GraphedEncoder

                self._graphs = GraphedEncoder(folded)
        else:
            self.impl = _own_implementation(model, impl, self.device)
            frozen = copy.deepcopy(model).to(self.device, dtype).requires_grad_(False).eval()
            if isinstance(frozen, M2Rec):
                frozen.impl = self.impl
            self._encode = self._encode_sound = frozen.encode
        self._ids = self.vocab if self.vocab is not None else Vocabulary(range(1, self.n_items + 1))
        self._popular: tuple[Tensor, Tensor] | None = None
        if self.popularity is not None:
            counts, order = self.popularity[1:].sort(descending=True, stable=True)
            self._popular = counts.double(), order + 1
        if index is not None and index.n_items != self.n_items:
            raise ValueError(f"index: expected {self.n_items} items, as in the model, got {index.n_items}")
        self.index = index
        self._process = os.getpid()

    @classmethod
    def from_pretrained(cls, folder: PathLike, **options: Any) -> Self:
        """A saved model, or the best one of a run.

        Args:
            folder: what `SequentialRecommender.from_pretrained` takes, or a run's folder with `best/` in it.
            **options: `impl`, `dtype`, `device` and `index`, as for the class.

        Raises:
            StorageError: as `SequentialRecommender.from_pretrained`.
            ImplementationError, ValueError: as the class.
        """
        best = Path(folder) / "best"
        return cls(SequentialRecommender.from_pretrained(best if best.is_dir() else folder), **options)

    @torch.no_grad()
    def recommend(
        self,
        histories: Iterable[Iterable[object]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        unknown: Unknown = "error",
        empty: Empty = "error",
    ) -> list[Recommendations]:
        """The k best items for each history, best first, of equal scores in the order of the catalogue.

        Args:
            histories: one sequence per user, oldest item first, of ids as the user knows them (through `vocab`; dense
                ids 1..n_items where there is none). Of a long history the last `max_len` items are read.
            k: how many, 1 to n_items.
            exclude_seen: leave out every item of the whole history, also beyond `max_len`. A user who has seen all
                but a few items gets only those few.
            unknown: "error" or "skip" for ids that are not in the catalogue.
            empty: "error", or "popular": a history of which nothing is left gets the most popular items.

        Raises:
            UnknownItemError: an id that is not in the catalogue, with `unknown="error"`.
            ValueError: an empty history, `empty="popular"` where the model has no popularity, a k outside 1..n_items,
                or scores that are NaN.
            TypeError: `histories` is not a sequence of sequences.
        """
        check_k(k, self.n_items)
        if empty not in ("error", "popular"):
            raise ValueError(f"empty: expected 'error' or 'popular', got {empty!r}")
        if empty == "popular" and self._popular is None:
            raise ValueError(
                "empty: expected 'error' with this model, which knows no item counts (popularity.safetensors is "
                "written by training), got 'popular'"
            )
        self._mind_a_fork()
        rows = read_histories(histories, self._ids, unknown, allow_empty=empty == "popular")
        dense = [row for row, _ in rows if row]
        answers = iter(self._answers(dense, k, exclude_seen))
        return [
            Recommendations(next(answers), skipped) if row else Recommendations(self._most_popular(k), skipped, True)
            for row, skipped in rows
        ]

    @torch.no_grad()
    def encode(self, histories: Iterable[Iterable[object]]) -> Tensor:
        """The query vectors [B, D] of histories, which are as for `recommend`.

        Raises:
            UnknownItemError, ValueError, TypeError: as `recommend`.
        """
        self._mind_a_fork()
        dense = [row for row, _ in read_histories(histories, self._ids, "error")]
        parts = [self._encode_rows(dense[i : i + _BATCH]) for i in range(0, len(dense), _BATCH)]
        return torch.cat(parts) if parts else self.item_weight.new_empty(0, self.item_weight.shape[1])

    @torch.no_grad()
    def encode_ids(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """The query vectors [B, D] of dense ids [B, L <= max_len], right-padded with 0, and lengths [B].

        Raises:
            TypeError, ValueError: as the model's `encode`.
        """
        self._mind_a_fork()
        return self._encode(item_ids.to(self.device), lengths.to(self.device))

    @torch.no_grad()
    def top(self, queries: Tensor, k: int, seen: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The k best items of each query.

        Args:
            queries: [B, D], from `encode` or `encode_ids`.
            k: 1 to n_items.
            seen: rows and dense ids, two int64 tensors [S]: what is left out of which row's answer.

        Returns:
            Scores [B, k] and dense ids [B, k]; a row of which fewer items are left ends in -inf and 0.

        Raises:
            ValueError: a k outside 1..n_items, or scores that are NaN.
        """
        check_k(k, self.n_items)
        self._mind_a_fork()
        return self._top(queries, k, seen)

    def _top(self, queries: Tensor, k: int, seen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        queries = queries.to(self.item_weight.dtype)
        if self.index is not None:
            return self.index.search(queries, k, seen, self.item_weight)
        return top_k(queries, self.item_weight, k, seen)

    def _answers(self, dense: list[list[int]], k: int, exclude_seen: bool) -> Iterator[list[Recommendation]]:
        for start in range(0, len(dense), _BATCH):
            rows = dense[start : start + _BATCH]
            seen = None
            if exclude_seen:
                places = _integers(chain.from_iterable(map(repeat, range(len(rows)), map(len, rows))))
                seen = places.to(self.device), _integers(chain.from_iterable(rows)).to(self.device)
            yield from named(*self._top(self._encode_rows(rows), k, seen), self.vocab)

    def _encode_rows(self, dense: list[list[int]]) -> Tensor:
        """The query vectors of histories whose ids are known to be sound."""
        recent = [row[-self.max_len :] for row in dense]
        longest = max(map(len, recent))
        item_ids = _integers(chain.from_iterable(row + [0] * (longest - len(row)) for row in recent))
        item_ids, lengths = item_ids.view(-1, longest), _integers(map(len, recent))
        if self._graphs is not None:  # they fetch their input themselves
            return self._graphs.encode(item_ids, lengths)
        return self._encode_sound(item_ids.to(self.device), lengths.to(self.device))

    def _most_popular(self, k: int) -> list[Recommendation]:
        assert self._popular is not None
        counts, ids = (tensor[None, :k] for tensor in self._popular)
        return next(named(counts, ids, self.vocab))

    def _mind_a_fork(self) -> None:
        if self._process != os.getpid():
            torch.set_num_threads(1)
            self._process = os.getpid()


def _integers(values: Iterable[int]) -> Tensor:
    """A 1-dim int64 tensor, several times as fast as `torch.tensor` of a list."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _own_implementation(model: nn.Module, impl: str, device: torch.device) -> str:
    """Which implementation a model runs that cannot be folded."""
    if isinstance(model, M2Rec):
        return chosen("last_scan", impl, device)
    if impl not in (AUTO, "reference"):
        raise ImplementationError(
            f"impl={impl!r} was asked for a {type(model).__name__}, which is plain PyTorch: impl='reference'"
        )
    return "reference"
