"""Items' metadata through a sentence encoder: batches by length, each kept as soon as it is computed."""

from __future__ import annotations

from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import polars as pl
import torch

from .._version import __version__
from ..data import DataError, TextTable
from ..storage import PathLike
from .cache import EmbeddingCache
from .encoder import DEFAULT_MODEL, Encoder, load_encoder
from .template import DEFAULT_TEMPLATE, Template

UNIT_LENGTH_TOLERANCE = 1e-3  # a float16 model's rows, too, count as normalised


class Embedded(NamedTuple):
    """What `embed_items` made.

    `table` has a row per item, zero for the `missing` items without text; `example` is the text of the first that has
    one. Of the `texts` distinct texts `computed` were
    run now, the rest came from the cache. `metadata` says how, in strings, for the file's header.
    """

    table: TextTable
    example: str
    missing: int
    texts: int
    computed: int
    metadata: dict[str, str]


def embed_items(
    items: pl.DataFrame,
    model: PathLike | Encoder = DEFAULT_MODEL,
    template: str = DEFAULT_TEMPLATE,
    *,
    batch_size: int = 32,
    device: str | None = None,
    prompt: str | None = None,
    cache: PathLike | None = None,
    progress: bool = True,
) -> Embedded:
    """Embed what is known about items.

    Args:
        items: a column `item` of distinct ids, and any of `title`, `categories` (list), `brand` and `description`, as
            `fastm2rec.data.read_items` gives them.
        model: a name on the Hugging Face hub, a folder, or what `load_encoder` returned.
        template: what is said of an item, see `Template`.
        batch_size: texts encoded at once.
        device, prompt: for a model that is loaded here, see `load_encoder`.
        cache: a folder in which embeddings are kept; a run that was killed goes on from there, and no text is embedded
            twice by the same model. None keeps nothing.
        progress: show a bar.

    Returns:
        float32 rows [n, T] in the order of `items`, of unit length if the model's own configuration normalises.

    Raises:
        ImportError: sentence-transformers is not installed.
        ValueError: a malformed template, a batch size below 1, or a model that cannot be loaded.
        DataError: repeated ids, or no item with any text.
        StorageError: the cache cannot be used.
    """
    said = Template(template)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if "item" not in items or items["item"].is_duplicated().any():
        raise DataError("items: expected a column item of distinct ids")
    texts = [said.render(row) for row in items.iter_rows(named=True)]
    distinct = list(dict.fromkeys(text for text in texts if text))
    if not distinct:
        raise DataError(f"items: none of {len(texts):,} items has any of the fields of {template!r}")
    encoder = model if isinstance(model, Encoder) else load_encoder(model, device=device, prompt=prompt)
    rows, computed = _rows(encoder, distinct, batch_size, cache, progress)

    embeddings = np.zeros((len(texts), len(rows[distinct[0]])), dtype=np.float32)
    for place, text in enumerate(texts):
        if text:
            embeddings[place] = rows[text]
    missing = texts.count("")
    lengths = np.linalg.norm(embeddings[[text != "" for text in texts]], axis=1)
    metadata = {
        "model": encoder.name,
        "model_version": encoder.version,
        "prompt": encoder.prompt,
        "template": template,
        "normalized": str(bool(np.abs(lengths - 1).max() < UNIT_LENGTH_TOLERANCE)).lower(),
        "items": str(len(texts)),
        "items_without_text": str(missing),
        "fastm2rec": __version__,
        "sentence_transformers": version("sentence-transformers"),
    }
    table = TextTable(items["item"].to_list(), torch.from_numpy(embeddings))
    return Embedded(table, distinct[0], missing, len(distinct), computed, metadata)


def _rows(
    encoder: Encoder, texts: list[str], batch_size: int, folder: PathLike | None, progress: bool
) -> tuple[dict[str, np.ndarray], int]:
    """The row of every text, and how many had to be computed."""
    from tqdm import tqdm

    cache = None if folder is None else EmbeddingCache(folder, encoder.identity)
    try:
        rows = {} if cache is None else cache.read(texts)
        # Texts of a length together, for little padding; the longest first, so that memory runs out at once or never.
        wanted = sorted((text for text in texts if text not in rows), key=len, reverse=True)
        with tqdm(total=len(texts), initial=len(rows), unit="text", disable=not progress) as bar:
            for start in range(0, len(wanted), batch_size):
                batch = wanted[start : start + batch_size]
                made = encoder.encode(batch)
                if not np.isfinite(made).all():
                    raise ValueError(f"model {encoder.name!r}: expected finite embeddings, got NaN or infinity")
                new = dict(zip(batch, made, strict=True))
                if cache is not None:
                    cache.write(new)
                rows.update(new)
                bar.update(len(batch))
    finally:
        if cache is not None:
            cache.close()
    return rows, len(wanted)
