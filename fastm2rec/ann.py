"""An approximate index of the items by FAISS, for catalogues of millions; what it misses is measured, not assumed.

    index = ItemIndex.build(recommender.item_weight, "HNSW32")
    index.recall(queries, 10, recommender.item_weight)
    index.save("items.faiss")
    Recommender(model, index=ItemIndex.load("items.faiss"))

The file is FAISS's own, and its ids are the model's dense ids 1..n_items.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._topk import rescored, top_k
from .storage import PathLike, StorageError, atomic_write_bytes

# Search effort where FAISS's own default, 16 and 1, finds too little: items looked at by HNSW, lists by IVF.
_EF_SEARCH, _NPROBE = 128, 16


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        message = "an index of the items needs faiss: pip install 'fastm2rec[ann]'"
        raise ImportError(message, name="faiss") from error
    return faiss


class ItemIndex:
    """A FAISS index of items by inner product; see `build` and `load`."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self.n_items = int(index.ntotal)
        self.dim = int(index.d)

    @classmethod
    def build(cls, weight: Tensor, factory: str = "HNSW32") -> ItemIndex:
        """An index of every item.

        Args:
            weight: [n_items + 1, D] floating point; row 0 is padding and left out.
            factory: FAISS's description of an index: "Flat" (exact), "HNSW32", "IVF1024,Flat", "IVF1024,PQ16", ...

        Raises:
            ImportError: FAISS is not installed.
            ValueError: FAISS does not know the description, or cannot train such an index on these items.
        """
        faiss = _faiss()
        items = weight[1:].detach().float().cpu().contiguous().numpy()
        try:
            index = faiss.index_factory(items.shape[1], f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
            index.train(items)
            index.add_with_ids(items, torch.arange(1, len(weight)).numpy())
        except RuntimeError as error:
            reason = re.sub(r"^Error in .*? at \S+:\d+: ", "", str(error))  # less the place in FAISS's source
            raise ValueError(f"factory: FAISS cannot build {factory!r} of {len(items):,} items: {reason}") from error
        return cls(_with_effort(index))

    def save(self, path: PathLike) -> None:
        """Write the index, whole or not at all.

        Raises:
            StorageError: nothing was written.
        """
        atomic_write_bytes(path, _faiss().serialize_index(self._index).tobytes())

    @classmethod
    def load(cls, path: PathLike) -> ItemIndex:
        """Read an index that `save` wrote.

        Raises:
            ImportError: FAISS is not installed.
            StorageError: the file is absent or not an index.
        """
        faiss = _faiss()
        if not Path(path).is_file():
            raise StorageError(f"cannot read {path}: no such file")
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise StorageError(f"{path} is truncated or not a FAISS index") from error
        return cls(_with_effort(index))

    def search(
        self, queries: Tensor, k: int, seen: tuple[Tensor, Tensor] | None, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What `Recommender.top` returns, approximately: the index may miss items.

        As many more items are fetched as the longest history could hide. A row for which the index finds fewer than k
        is answered exactly.

        Args:
            queries: [B, D] floating point.
            k: 1 to n_items.
            seen: rows and dense ids left out, or None.
            weight: [n_items + 1, D], for the rows that are answered exactly.

        Raises:
            ValueError: queries of another width than the index's.
        """
        if queries.shape[1] != self.dim:
            raise ValueError(f"queries: expected shape [B, {self.dim}], as in the index, got {list(queries.shape)}")
        rows, width = len(queries), self.n_items + 1
        pairs, hidden = None, 0
        if seen is not None and len(seen[0]):
            pairs = (seen[0] * width + seen[1]).unique()
            hidden = int((pairs // width).bincount().max())
        fetched = min(k + hidden, self.n_items)
        _, ids = self._index.search(queries.float().cpu().contiguous().numpy(), fetched)
        found = torch.from_numpy(ids).to(queries.device).clamp(min=0)  # FAISS says -1 where it finds nothing
        if pairs is not None:
            place = torch.arange(rows, device=found.device).unsqueeze(1) * width
            found = found.masked_fill(torch.isin(place + found, pairs), 0)
        values, found = rescored(queries, weight, found, k)
        short = values[:, -1] == -torch.inf
        if short.any():
            chosen = short.nonzero().squeeze(1)
            values[chosen], found[chosen] = top_k(queries[chosen], weight, k, _of_rows(seen, chosen, rows))
        return values, found

    def recall(self, queries: Tensor, k: int, weight: Tensor) -> float:
        """The share of the exact k best items that the index finds, over all queries [B, D]."""
        queries = queries.to(weight.dtype)
        _, exact = top_k(queries, weight, k)
        _, found = self.search(queries, k, None, weight)
        return float((exact.unsqueeze(2) == found.unsqueeze(1)).any(2).double().mean())


def _with_effort(index: Any) -> Any:
    """Set how hard the index looks; FAISS keeps that for some indexes in the file and for others not."""
    faiss = _faiss()
    inner = faiss.downcast_index(index.index) if hasattr(index, "index") else index
    if hasattr(inner, "hnsw"):
        inner.hnsw.efSearch = max(inner.hnsw.efSearch, _EF_SEARCH)
    elif hasattr(inner, "nprobe"):
        inner.nprobe = min(max(inner.nprobe, _NPROBE), inner.nlist)
    return index


def _of_rows(seen: tuple[Tensor, Tensor] | None, chosen: Tensor, rows: int) -> tuple[Tensor, Tensor] | None:
    """`seen` of the chosen rows alone, counted among them."""
    if seen is None:
        return None
    place = torch.full((rows,), -1, dtype=torch.int64, device=chosen.device)
    place[chosen] = torch.arange(len(chosen), device=chosen.device)
    kept = place[seen[0]] >= 0
    return place[seen[0][kept]], seen[1][kept]
