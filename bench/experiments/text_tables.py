"""The text tables that text.yaml compares, beside the one that lies in a data set's folder.

    python bench/experiments/text_tables.py --data DIR --work runs/accuracy --model MODEL

writes WORK/text/DATASET/NAME.safetensors, where `bench/accuracy.py` looks for them:

    titles    MODEL, titles alone; none where the full template has nothing else
    tuned     MODEL after `fastm2rec tune-text` on pairs of the training part, full template
    tfidf     no encoder: TF-IDF of the words of the same text, reduced to the same width
    permuted  the folder's table with its rows dealt out anew among the items of the log

A table that is already there is kept, so the same command goes on where it was stopped. The folder's own table is made
with its template in `FULL` by

    fastm2rec embed-items --dataset NAME --data DIR/NAME --model MODEL --template '...' --out DIR/NAME/text.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # from a clone, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from bench.experiments.plan import TEXT_FOLDER, text_table
from fastm2rec.data import DataError, Loaded, TextTable, load_dataset, save_text_table
from fastm2rec.text import Template, embed_items, item_table, load_encoder, tune_encoder

# What the folder's table says of an item. A venue's title is its category, and nothing else is known of it.
FULL = {
    "amazon-beauty": "{title}, {brand}, {categories: }",
    "foursquare-nyc": "{title}",
    "ml-100k": "{title}, {categories: }",
}
TITLES = "{title}"
NAMES = ("permuted", "tfidf", "tuned", "titles")  # the quickest first
WIDTH = 384  # of all-MiniLM-L6-v2


def tfidf(texts: Sequence[str], width: int = WIDTH) -> Tensor:
    """[n, T] float32: the words of each text, weighted and reduced by a truncated SVD; T is at most `width`.

    The result is turned at random, which changes no distance. `text_scale` would otherwise raise each singular vector
    to the same variance, and the last ones are noise.
    """
    from sklearn.decomposition import TruncatedSVD  # type: ignore[import-untyped]
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]

    words = TfidfVectorizer(sublinear_tf=True, dtype=np.float32).fit_transform(texts)
    reduced = TruncatedSVD(min(width, *(size - 1 for size in words.shape)), random_state=0).fit_transform(words)
    found = torch.from_numpy(reduced).float()
    turn = torch.linalg.qr(torch.randn(found.shape[1], found.shape[1], generator=torch.Generator().manual_seed(0)))[0]
    return found @ turn


def permuted(table: Tensor) -> Tensor:
    """The rows of [n, T] in random order: the same vectors, which now say nothing about their items."""
    return table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]


def make(name: str, loaded: Loaded, template: str, model: str, pairs: int, out: Path) -> None:
    """Write one table.

    Args:
        name: one of `NAMES`.
        loaded: the data set with the folder's own table.
        template: what that table says of an item.
        model: the encoder.
        pairs: how many pairs of items `tuned` is trained on, at most.
        out: the file; a tuned encoder goes into a folder beside it.

    Raises:
        DataError: `permuted`, and the folder has no table; or as `embed_items` and `tune_encoder` raise.
    """
    vocab = loaded.dataset.vocab
    if name == "permuted":
        if loaded.text is None:
            raise DataError("permuted: expected a file text* in the data folder, got none; see the top of this script")
        save_text_table(out, TextTable(list(vocab.items), permuted(loaded.text.table[1:])))
        return
    items = item_table(loaded)
    texts = [Template(template).render(row) for row in items.iter_rows(named=True)]
    if name == "tfidf":
        save_text_table(out, TextTable(list(vocab.items), tfidf(texts)), {"template": template})
        return
    if name == "tuned":
        folder = out.parent / "tuned-encoder"
        if not folder.exists():
            print(tune_encoder(loaded.dataset, texts, folder, model, max_pairs=pairs), flush=True)
        model = str(folder)
    made = embed_items(items, load_encoder(model), TITLES if name == "titles" else template, cache=out.parent)
    save_text_table(out, made.table, made.metadata)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="holds one folder for each data set")
    add("--work", type=Path, default=Path("runs/accuracy"), help="the same as of bench/accuracy.py")
    add("--datasets", nargs="+", choices=FULL, default=list(FULL), help="(default: all)")
    add("--tables", nargs="+", choices=NAMES, default=list(NAMES), help="(default: all)")
    add("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a folder or a name on the Hugging Face hub")
    add("--pairs", type=int, default=4000, help="pairs that the encoder is tuned on, at most (default: 4000)")
    options = parser.parse_args(arguments)
    try:
        for dataset in options.datasets:
            loaded = load_dataset(dataset, options.data / dataset, text="auto")
            for name in options.tables:
                out = text_table(options.work / TEXT_FOLDER, dataset, name)
                if out.exists() or (name == "titles" and FULL[dataset] == TITLES):
                    continue
                out.parent.mkdir(parents=True, exist_ok=True)
                make(name, loaded, FULL[dataset], options.model, options.pairs, out)
                print(f"written: {out}", flush=True)
    except (OSError, ValueError, DataError) as error:
        print(f"text_tables: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
