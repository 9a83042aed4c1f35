"""What the commands that read raw data share: which data set, its k-core, its columns, and its item table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._arguments import count

if TYPE_CHECKING:
    import polars as pl

COLUMNS = ("user", "item", "timestamp", "rating")


def add_dataset(parser: argparse.ArgumentParser, names: Sequence[str], core: int = 5) -> None:
    """--dataset, --data, the k-core and the columns of a table."""
    add = parser.add_argument
    add("--dataset", required=True, choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    add("--data", metavar="DIR", help="folder of its files as published, or one file")
    add("--user-min", type=count, default=core, help=f"k-core: events of a user, 0 keeps all (default: {core})")
    add("--item-min", type=count, default=core, help=f"k-core: events of an item, 0 keeps all (default: {core})")
    columns = parser.add_argument_group("columns of a table (--dataset table)")
    for name in COLUMNS:
        columns.add_argument(f"--{name}-column", metavar="NAME")
    columns.add_argument("--no-timestamp", action="store_true", help="the file's order is the order in time")


def dataset_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """The k-core and columns for `load_dataset`."""
    given = {name: getattr(options, f"{name}_column") for name in COLUMNS}
    columns: dict[str, Any] = {name: column for name, column in given.items() if column is not None}
    if options.no_timestamp:
        columns["timestamp"] = None
    if columns and options.dataset != "table":
        parser.error(f"--dataset {options.dataset} has no columns to name; that is for --dataset table")
    return {"user_min": options.user_min, "item_min": options.item_min, **columns}


def add_item_file(parser: argparse.ArgumentParser) -> None:
    """--item-file and --item-format."""
    parser.add_argument(
        "--item-file", type=Path, metavar="FILE",
        help="take what is known about the items from this file, not from the data set's own",
    )  # fmt: skip
    parser.add_argument(
        "--item-format", default="table", metavar="FORMAT",
        help="of that file (default: table, a .csv, .tsv or .parquet with the columns item, title and, if present, "
        "categories, brand, description)",
    )  # fmt: skip


def read_item_file(options: argparse.Namespace) -> pl.DataFrame | None:
    from ..data import read_items

    return None if options.item_file is None else read_items(options.item_file, options.item_format)
