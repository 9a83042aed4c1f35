"""`fastm2rec prepare`: a raw log in the form that training reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._arguments import PROGRAM, count


def run(arguments: list[str]) -> int:
    from ..data import NAMES, TextTable, download, load_dataset, save_text_table

    parser = argparse.ArgumentParser(
        f"{PROGRAM} prepare",
        description="Bring a log into the form that training reads: k-core, order in time, dense ids. "
        "Then: train --dataset prepared --data OUT.",
    )
    add = parser.add_argument
    add("--dataset", required=True, choices=[name for name in NAMES if name != "prepared"], metavar="NAME",
        help=f"one of {', '.join(name for name in NAMES if name != 'prepared')}")  # fmt: skip
    add("--data", metavar="DIR", help="folder of its files as published, or one file")
    add("--download", action="store_true", help="fetch the publisher's file into --data first, with its checksum")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    add("--user-min", type=count, default=5, help="k-core: events of a user, 0 keeps all (default: 5)")
    add("--item-min", type=count, default=5, help="k-core: events of an item, 0 keeps all (default: 5)")
    add("--text", default="auto", help="auto (a file text* in --data), none, or a table of text embeddings")
    columns = parser.add_argument_group("columns of a table (--dataset table)")
    for name in ("user", "item", "timestamp", "rating"):
        columns.add_argument(f"--{name}-column", metavar="NAME")
    columns.add_argument("--no-timestamp", action="store_true", help="the file's order is the order in time")
    options = parser.parse_args(arguments)

    given = {name: getattr(options, f"{name}_column") for name in ("user", "item", "timestamp", "rating")}
    columns_given: dict[str, Any] = {name: column for name, column in given.items() if column is not None}
    if options.no_timestamp:
        columns_given["timestamp"] = None
    if columns_given and options.dataset != "table":
        parser.error(f"--dataset {options.dataset} has no columns to name; that is for --dataset table")
    if options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"{options.out} is not empty; name a new folder with --out")
    if options.download:
        if options.data is None:
            parser.error("--download: expected a folder for the file, --data DIR")
        download(options.dataset, options.data)
    loaded = load_dataset(
        options.dataset,
        options.data,
        user_min=options.user_min,
        item_min=options.item_min,
        text=options.text,
        **columns_given,
    )
    loaded.dataset.save(options.out)
    if loaded.text is not None:
        table = TextTable(loaded.dataset.vocab.items, loaded.text.table[1:])
        save_text_table(options.out / "text.safetensors", table)
    for name, value in loaded.dataset.statistics().items():
        print(f"{name.replace('_', ' '):<14} {value:,}")
    if loaded.text is not None:
        print(f"{'text':<14} {loaded.text_source}, {loaded.text.missing:,} items without")
    print(f"{'written to':<14} {options.out}")
    return 0
