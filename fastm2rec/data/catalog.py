"""Data sets by name: which files they are made of, and how those become sequences.

Every data set is brought to its 5-core (each user and each item with at least five events) unless asked otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage import PathLike
from ._polars import pl
from .files import DataError
from .log import SEQUENCES_FILE, SequenceDataset, k_core
from .readers import read_items, read_log
from .synthetic import synthetic
from .text_table import AlignedText, TextTable, align, find_text_table, load_text_table


@dataclass(frozen=True)
class Source:
    """Where a data set's files are: patterns within its folder, the first that matches counts."""

    log_format: str
    log_files: tuple[str, ...]
    item_format: str | None = None
    item_files: tuple[str, ...] = ()


SOURCES: dict[str, Source] = {
    "ml-100k": Source(
        "movielens-100k", ("u.data", "u.data.gz", "ml-100k/u.data", "ml-100k.zip"),
        "movielens-100k", ("u.item", "u.item.gz", "ml-100k/u.item", "ml-100k.zip"),
    ),
    "ml-1m": Source(
        "movielens-dat", ("ratings.dat", "ratings.dat.gz", "ml-1m/ratings.dat", "ml-1m.zip", "ratings*.dat.gz"),
        "movielens-dat", ("movies.dat", "movies.dat.gz", "ml-1m/movies.dat", "ml-1m.zip"),
    ),
    "amazon-beauty": Source(
        "sequences", ("user_sequence.txt", "user_sequence.txt.gz"), "amazon", ("meta_*.json", "meta_*.json.gz"),
    ),
    "amazon": Source(
        "amazon", ("reviews_*.json*", "[A-Z]*.json", "[A-Z]*.json.gz", "*.jsonl", "*.jsonl.gz"),
        "amazon", ("meta_*.json", "meta_*.json.gz", "meta_*.jsonl", "meta_*.jsonl.gz"),
    ),
    "foursquare-nyc": Source(
        "foursquare", ("dataset_TSMC2014_NYC*.txt", "dataset_TSMC2014_NYC*.txt.gz", "dataset_tsmc2014.zip"),
        "foursquare", ("dataset_TSMC2014_NYC*.txt", "dataset_TSMC2014_NYC*.txt.gz", "dataset_tsmc2014.zip"),
    ),
    "gowalla": Source("gowalla", ("loc-gowalla_totalCheckins.txt", "loc-gowalla_totalCheckins.txt.gz")),
    "recbole": Source("recbole", ("*.inter", "*.inter.gz"), "recbole", ("*.item", "*.item.gz")),
    "sequences": Source("sequences", ("*.txt", "*.txt.gz")),
    "table": Source("table", ("*.csv", "*.csv.gz", "*.tsv", "*.tsv.gz", "*.parquet")),
}  # fmt: skip

NAMES = (*SOURCES, "synthetic", "prepared")


@dataclass(frozen=True)
class Loaded:
    """A data set, with the text embeddings that came with it, if any.

    Args:
        dataset: the sequences.
        files: what was read, for the record.
        text: embeddings in the order of the vocabulary.
        text_source: where they came from.
        items: the item table, as `read_items` gives it, also of items that no event has; None if there was none.
        log: the events behind the sequences, as `read_log` gives them; None for a prepared data set.
    """

    dataset: SequenceDataset
    files: tuple[str, ...]
    text: AlignedText | None = None
    text_source: str | None = None
    items: pl.DataFrame | None = None
    log: pl.DataFrame | None = None


def load_dataset(
    name: str,
    folder: PathLike | None = None,
    *,
    user_min: int = 5,
    item_min: int = 5,
    text: str = "none",
    **options: Any,
) -> Loaded:
    """Read a data set by name.

    Args:
        name: one of `NAMES`. "synthetic" needs no folder; "prepared" is a folder that `SequenceDataset.save` wrote.
        folder: where its files are, as published, unpacked or not; or, for the general formats, one file.
        user_min, item_min: the k-core; 0 keeps all.
        text: "auto" takes the file `text*` in the folder if there is one, "none" takes none, else a file's path.
        **options: names of columns for "table"; sizes for "synthetic".

    Raises:
        DataError: an unknown name, files that are not there, several that could be meant, or malformed ones.
        StorageError: a prepared folder that is damaged.
    """
    if name not in NAMES:
        raise DataError(f"dataset: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "synthetic":
        made = synthetic(**options)
        log = _core(made.log, user_min, item_min)
        dataset = SequenceDataset.from_log(log, made.items)
        if text in ("auto", "none"):
            own = align(TextTable(made.items["item"].to_list(), made.text[1:]), dataset.vocab)
            table, origin = (own, "synthetic") if text == "auto" else (None, None)
        else:
            table, origin = _text(text, None, dataset)
        return Loaded(dataset, (), table, origin, made.items, log)
    if folder is None:
        raise DataError(f"data: expected the folder of {name}, got none")
    folder = Path(folder)
    if not folder.exists():
        raise DataError(f"{folder}: no such file or folder")
    if name == "prepared":
        dataset = SequenceDataset.load(folder)
        return Loaded(dataset, (str(folder / SEQUENCES_FILE),), *_text(text, folder, dataset))
    source = SOURCES[name]
    log_file = folder if folder.is_file() else _find(folder, source.log_files, name)
    if log_file is None:
        raise DataError(f"{folder}: no file of {name}; looked for {', '.join(source.log_files)}")
    log = _core(read_log(log_file, source.log_format, **options), user_min, item_min)
    files = [log_file]
    items = None
    if source.item_format is not None and folder.is_dir():
        item_file = _find(folder, source.item_files, name)
        if item_file is not None:
            items = read_items(item_file, source.item_format)
            files.append(item_file)
    dataset = SequenceDataset.from_log(log, items)
    place = folder if folder.is_dir() else folder.parent
    return Loaded(dataset, tuple(dict.fromkeys(map(str, files))), *_text(text, place, dataset), items, log)


def _core(log: pl.DataFrame, user_min: int, item_min: int) -> pl.DataFrame:
    return k_core(log, user_min, item_min) if max(user_min, item_min) > 1 else log


def _text(text: str, folder: Path | None, dataset: SequenceDataset) -> tuple[AlignedText | None, str | None]:
    if text == "none":
        return None, None
    path = (find_text_table(folder) if folder is not None else None) if text == "auto" else Path(text)
    return (None, None) if path is None else (align(load_text_table(path), dataset.vocab, path), str(path))


def _find(folder: Path, patterns: tuple[str, ...], name: str) -> Path | None:
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("meta_") or "meta" in pattern)
        if len(found) > 1:
            raise DataError(f"{folder}: expected one file of {name}, got {', '.join(path.name for path in found)}")
        if found:
            return found[0]
    return None
