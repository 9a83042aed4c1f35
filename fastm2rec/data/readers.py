"""One door to every format: `read_log` for interactions, `read_items` for what the items are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..storage import PathLike
from . import amazon, delimited
from ._polars import pl
from .files import DataError

LOG_FORMATS: dict[str, Callable[..., pl.DataFrame]] = {
    "movielens-dat": delimited.movielens_dat,
    "movielens-100k": delimited.movielens_100k,
    "amazon": amazon.amazon_reviews,
    "foursquare": delimited.foursquare,
    "gowalla": delimited.gowalla,
    "sequences": delimited.sequences,
    "recbole": delimited.recbole,
    "table": delimited.table,
}

ITEM_FORMATS: dict[str, Callable[..., pl.DataFrame]] = {
    "movielens-dat": delimited.movielens_dat_items,
    "movielens-100k": delimited.movielens_100k_items,
    "amazon": amazon.amazon_items,
    "foursquare": delimited.foursquare_items,
    "recbole": delimited.recbole_items,
    "table": delimited.table_items,
}

# What the publishers call their files, and the endings that say it all; the first that fits decides.
_BY_NAME = (
    ("ratings.dat", "movielens-dat"),
    ("ml-1m.zip", "movielens-dat"),
    ("u.data", "movielens-100k"),
    ("ml-100k.zip", "movielens-100k"),
    ("dataset_TSMC2014", "foursquare"),
    ("loc-gowalla", "gowalla"),
    ("user_sequence", "sequences"),
    (".inter", "recbole"),
    (".jsonl", "amazon"),
    (".json", "amazon"),
    (".csv", "table"),
    (".tsv", "table"),
    (".parquet", "table"),
)


def detect_format(path: PathLike) -> str:
    """The log format that a file's name speaks of.

    Raises:
        DataError: none does; the message lists the formats.
    """
    name = Path(path).name
    for part, found in _BY_NAME:
        if part in name:
            return found
    raise DataError(f"{path}: the name tells no format; give one of {', '.join(LOG_FORMATS)}")


def read_log(path: PathLike, format: str = "auto", **options: Any) -> pl.DataFrame:
    """Read an interaction log, the whole file or an error.

    Args:
        path: the file, plain or packed as .gz or .zip.
        format: one of `LOG_FORMATS`, or "auto" to go by the file's name.
        **options: for "table", the names of the columns; see `delimited.table`.

    Returns:
        Columns `user` and `item` (Int64 where all ids are integers, else String), `timestamp` (Int64; null throughout
        where the format has none, and then the file's order is the order in time) and, where given, `rating` (Float64).
        Rows are in the file's order.

    Raises:
        DataError: an unknown format, an unreadable file, or a malformed line, by number.
    """
    if format == "auto":
        format = detect_format(path)
    if format not in LOG_FORMATS:
        raise DataError(f"format: expected one of auto, {', '.join(LOG_FORMATS)}, got {format!r}")
    log = LOG_FORMATS[format](path, **options)
    if log.is_empty():
        raise DataError(f"{path}: expected at least one interaction, got none")
    return log


def read_items(path: PathLike, format: str, **options: Any) -> pl.DataFrame:
    """Read an item table.

    Args:
        path: the file, plain or packed as .gz or .zip.
        format: one of `ITEM_FORMATS`.
        **options: for "table", the names of the columns; see `delimited.table_items`.

    Returns:
        Columns `item`, `title`, `categories` (list of strings), `brand` and `description`; null where unknown.

    Raises:
        DataError: an unknown format, an unreadable file, or a malformed line, by number.
    """
    if format not in ITEM_FORMATS:
        raise DataError(f"format: expected one of {', '.join(ITEM_FORMATS)}, got {format!r}")
    return ITEM_FORMATS[format](path, **options)
