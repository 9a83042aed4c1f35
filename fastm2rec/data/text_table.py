"""Text embeddings of items, made elsewhere: read from a file, matched to a vocabulary by the items' own ids."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..storage import PathLike, StorageError, load_tensors, read_json, save_tensors
from ..vocab import ItemId, Vocabulary
from ._polars import pl
from .files import DataError, natural_ids, read_bytes, read_parquet

ENDINGS = (".safetensors", ".npz", ".npy", ".parquet")
IDS_ENDING = ".ids.json"


class TextTable(NamedTuple):
    """`embeddings` [n, T] float32, row i for the item `items[i]`."""

    items: list[ItemId]
    embeddings: Tensor


class AlignedText(NamedTuple):
    """`table` [n_items + 1, T] in the order of a vocabulary, row 0 zero; `missing` items have a zero row, too."""

    table: Tensor
    missing: int


def load_text_table(path: PathLike) -> TextTable:
    """Read a table of text embeddings. Nothing in the file is executed.

    Args:
        path: by its ending, .npz with the arrays `item_ids` [n] and `embeddings` [n, T]; .npy [n, T] with the ids as a
            JSON list beside it (`NAME.ids.json`); .safetensors with `embeddings` and the ids as a tensor `item_ids`, as
            a JSON list `item_ids` in the metadata, or beside it like that; .parquet with the columns `item_id` and
            `embedding` (a list of numbers).

    Raises:
        DataError: an unknown ending, missing arrays, shapes that do not fit, repeated ids, or values not finite.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise DataError(f"{path}: expected a file ending in {', '.join(ENDINGS)}")
    try:
        ids, values = _READERS[path.suffix](path)
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, StorageError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a table of text embeddings: {error}") from None
    if values.ndim != 2 or not values.shape[1] or not np.issubdtype(values.dtype, np.floating):
        raise DataError(
            f"{path}: embeddings: expected floating point of shape [n, T], got {values.dtype} {values.shape}"
        )
    if len(ids) != len(values):
        raise DataError(f"{path}: expected one id per embedding, got {len(ids)} ids and {len(values)} embeddings")
    with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{path}: embeddings: expected finite values, got NaN or infinity")
    try:
        Vocabulary(ids)
    except ValueError as error:
        raise DataError(f"{path}: item_ids: {error}") from None
    return TextTable(ids, torch.from_numpy(values))


def save_text_table(path: PathLike, text: TextTable, metadata: Mapping[str, str] | None = None) -> None:
    """Write a table as one .safetensors file for `load_text_table`, the ids in its metadata.

    Args:
        path: with the ending .safetensors.
        text: the table.
        metadata: more strings for the file's header, such as where the table came from.

    Raises:
        DataError: another ending, by which it could not be read.
        StorageError: it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise DataError(f"{path}: expected a file ending in .safetensors")
    # One file, so that ids and rows cannot come from different tables; safetensors has no tensors of strings.
    save_tensors(path, {"embeddings": text.embeddings}, {**(metadata or {}), "item_ids": json.dumps(text.items)})


def _npz(path: Path) -> tuple[list[ItemId], np.ndarray]:
    arrays = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError("not an archive of arrays")
    with arrays:
        return _as_ids(arrays["item_ids"]), arrays["embeddings"]


def _npy(path: Path) -> tuple[list[ItemId], np.ndarray]:
    values = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
    if not isinstance(values, np.ndarray):
        raise ValueError("not a single array")
    return _ids_beside(path), values


def _safetensors(path: Path) -> tuple[list[ItemId], np.ndarray]:
    tensors, metadata = load_tensors(path)
    embeddings = tensors["embeddings"]
    values = (embeddings.float() if embeddings.is_floating_point() else embeddings).numpy()
    if "item_ids" in tensors:
        return _as_ids(tensors["item_ids"].numpy()), values
    if "item_ids" in metadata:
        return _as_list(json.loads(metadata["item_ids"]), "item_ids"), values
    return _ids_beside(path), values


def _ids_beside(path: Path) -> list[ItemId]:
    beside = path.with_suffix(IDS_ENDING)
    return _as_list(read_json(beside), beside)


def _as_list(ids: object, name: object) -> list[ItemId]:
    if not isinstance(ids, list):
        raise ValueError(f"{name}: expected a list of ids, got {type(ids).__name__}")
    return ids


def _parquet(path: Path) -> tuple[list[ItemId], np.ndarray]:
    frame = read_parquet(path)
    missing = [name for name in ("item_id", "embedding") if name not in frame]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; the columns are {', '.join(frame.columns)}")
    try:
        ids, column = natural_ids(frame["item_id"]).to_list(), frame["embedding"]
        if isinstance(column.dtype, pl.Array):
            column = column.arr.to_list()
        lengths = column.list.len().unique().sort()
    except pl.exceptions.PolarsError as error:
        raise ValueError(error) from None
    if len(lengths) > 1:
        raise DataError(f"{path}: embedding: expected lists of one length, got {lengths.to_list()}")
    return ids, np.array(column.to_list())


_READERS = {".npz": _npz, ".npy": _npy, ".safetensors": _safetensors, ".parquet": _parquet}


def _as_ids(array: np.ndarray) -> list[ItemId]:
    if array.ndim != 1 or array.dtype.kind not in "iuUS":
        raise ValueError(f"item_ids: expected a vector of integers or strings, got {array.dtype} {array.shape}")
    return [item.decode() if isinstance(item, bytes) else item for item in array.tolist()]


def align(text: TextTable, vocab: Vocabulary, name: object = "text") -> AlignedText:
    """Bring a table into the order of `vocab`; items that it lacks get a zero row, and all zero rows are counted.

    Raises:
        DataError: ids of another type than the vocabulary's, or no item in common.
    """
    kind = type(text.items[0]) if text.items else vocab.kind
    if kind is not vocab.kind:
        raise DataError(f"{name}: expected item ids of type {vocab.kind.__name__}, as in the log, got {kind.__name__}")
    place = {item: row for row, item in enumerate(text.items)}
    rows = torch.tensor([place.get(item, -1) for item in vocab.items])
    known = rows >= 0
    if not known.any():
        raise DataError(f"{name}: no item of the log is in the table, whose ids look like {text.items[:1]}")
    table = torch.zeros(len(vocab) + 1, text.embeddings.shape[1])
    table[1:][known] = text.embeddings[rows[known]]
    return AlignedText(table, int((table[1:] == 0).all(dim=1).sum()))


def find_text_table(folder: PathLike) -> Path | None:
    """The table `text*` in a data folder; None if there is none.

    Raises:
        DataError: there are several.
    """
    found = sorted(path for path in Path(folder).glob("text*") if path.suffix in ENDINGS)
    if len(found) > 1:
        raise DataError(f"{folder}: expected one text table, got {', '.join(path.name for path in found)}; name one")
    return found[0] if found else None
