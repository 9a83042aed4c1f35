"""`fastm2rec embed-items`: what is known about the items, as the text table that the gates read."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._arguments import PROGRAM, positive
from ._data import add_dataset, add_item_file, dataset_options, read_item_file


def run(arguments: list[str]) -> int:
    from ..data import NAMES, load_dataset, save_text_table
    from ..text import DEFAULT_MODEL, DEFAULT_TEMPLATE, embed_items, item_table
    from ..text.cache import default_folder

    parser = argparse.ArgumentParser(
        f"{PROGRAM} embed-items",
        description="Embed titles, categories, brands and descriptions of the items with a sentence encoder. A run "
        "that was stopped goes on from its cache. Then: train --text FILE.",
    )
    add_dataset(parser, NAMES, core=0)
    add_item_file(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="the table, ending in .safetensors")
    add("--all-items", action="store_true", help="also items of the item table that no event has")
    add("--model", default=DEFAULT_MODEL, help=f"a folder or a name on the Hugging Face hub (default: {DEFAULT_MODEL})")
    add("--prompt", metavar="TEXT", help="put in front of every text (default: what the model's configuration says)")
    add("--template", default=DEFAULT_TEMPLATE, metavar="TEXT",
        help="what is said of an item; a missing field drops out with the label in front of it, and {categories: / } "
        f"joins a list with ' / ' (default: '{DEFAULT_TEMPLATE}')")  # fmt: skip
    add("--batch-size", type=positive, default=32, help="texts encoded at once (default: 32)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--cache", type=Path, metavar="DIR", default=default_folder(),
        help="where embeddings are kept, by model and text (default: %(default)s)")  # fmt: skip
    cache.add_argument("--no-cache", action="store_true", help="keep none; a run that is stopped starts again")
    options = parser.parse_args(arguments)

    if options.out.suffix != ".safetensors":
        parser.error(f"--out: expected a file ending in .safetensors, got {options.out}")
    loaded = load_dataset(options.dataset, options.data, **dataset_options(parser, options))
    items = item_table(loaded, read_item_file(options), unseen=options.all_items)
    made = embed_items(
        items,
        options.model,
        options.template,
        batch_size=options.batch_size,
        device=options.device,
        prompt=options.prompt,
        cache=None if options.no_cache else options.cache,
    )
    save_text_table(options.out, made.table, made.metadata)
    length = "unit length" if made.metadata["normalized"] == "true" else "the model's own lengths"
    for name, value in (
        ("items", f"{len(items):,}"),
        ("without text", f"{made.missing:,}" + (", their rows are zero" if made.missing else "")),
        ("texts", f"{made.texts:,} distinct, {made.computed:,} embedded now, {made.texts - made.computed:,} known"),
        ("an example", made.example),
        ("model", f"{options.model}, {made.metadata['model_version']}"),
        ("rows", f"{made.table.embeddings.shape[1]:,} numbers, {length}"),
        ("written to", options.out),
    ):
        print(f"{name:<14} {value}")
    return 0
