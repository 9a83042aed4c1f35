"""`fastm2rec prepare`: a raw log in the form that training reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._arguments import PROGRAM
from ._data import add_dataset, dataset_options


def run(arguments: list[str]) -> int:
    from ..data import NAMES, TextTable, download, load_dataset, save_text_table

    parser = argparse.ArgumentParser(
        f"{PROGRAM} prepare",
        description="Bring a log into the form that training reads: k-core, order in time, dense ids. "
        "Then: train --dataset prepared --data OUT.",
    )
    add = parser.add_argument
    add_dataset(parser, [name for name in NAMES if name != "prepared"])
    add("--download", action="store_true", help="fetch the publisher's file into --data first, with its checksum")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    add("--text", default="auto", help="auto (a file text* in --data), none, or a table of text embeddings")
    options = parser.parse_args(arguments)

    how = dataset_options(parser, options)
    if options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"{options.out} is not empty; name a new folder with --out")
    if options.download:
        if options.data is None:
            parser.error("--download: expected a folder for the file, --data DIR")
        download(options.dataset, options.data)
    loaded = load_dataset(options.dataset, options.data, text=options.text, **how)
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
