"""`fastm2rec tune-text`: a sentence encoder tuned on which items follow each other."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._arguments import PROGRAM, positive
from ._data import add_dataset, add_item_file, dataset_options, read_item_file


def run(arguments: list[str]) -> int:
    from ..data import NAMES, load_dataset
    from ..text import DEFAULT_MODEL, DEFAULT_TEMPLATE, Template, item_table, tune_encoder

    parser = argparse.ArgumentParser(
        f"{PROGRAM} tune-text",
        description="Fine-tune a sentence encoder on pairs of items that follow each other in the training part of the "
        "sequences; what is held out for validation and test is not read. Then: embed-items --model FOLDER with the "
        "same template.",
    )
    add_dataset(parser, NAMES)
    add_item_file(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder for the model")
    add("--model", default=DEFAULT_MODEL, help=f"a folder or a name on the Hugging Face hub (default: {DEFAULT_MODEL})")
    add("--template", default=DEFAULT_TEMPLATE, metavar="TEXT", help=f"see embed-items (default: '{DEFAULT_TEMPLATE}')")
    add("--window", type=positive, default=1, help="how many places later the second item may stand (default: 1)")
    add("--epochs", type=positive, default=1, help="passes over the pairs (default: 1)")
    add("--batch-size", type=positive, default=64, help="pairs of a step; the others are the negatives (default: 64)")
    add("--lr", type=float, default=2e-5, help="peak learning rate (default: 2e-5)")
    add("--max-pairs", type=positive, metavar="N", help="a random choice of so many pairs (default: all)")
    add("--seed", type=int, default=0, help="of that choice and of the training (default: 0)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    options = parser.parse_args(arguments)

    template = Template(options.template)
    loaded = load_dataset(options.dataset, options.data, **dataset_options(parser, options))
    items = item_table(loaded, read_item_file(options))
    result = tune_encoder(
        loaded.dataset,
        [template.render(row) for row in items.iter_rows(named=True)],
        options.out,
        options.model,
        window=options.window,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        max_pairs=options.max_pairs,
        seed=options.seed,
        device=options.device,
    )
    print(
        f"{result.pairs:,} pairs, {result.steps:,} steps; loss {result.first_loss:.4f} in the first tenth, "
        f"{result.last_loss:.4f} in the last\nwritten to {options.out}\n"
        f"its embeddings: {PROGRAM} embed-items --model {options.out} ..."
    )
    return 0
