"""The items of a data set with what is known about each."""

from __future__ import annotations

import polars as pl

from ..data import DataError, Loaded
from ..data.delimited import item_frame


def item_table(loaded: Loaded, items: pl.DataFrame | None = None, *, unseen: bool = False) -> pl.DataFrame:
    """The items of `loaded` in the order of its vocabulary, one row each: `item` and the fields of a template.

    Args:
        loaded: a data set; its own item table counts, or else its vocabulary's titles.
        items: take this item table instead.
        unseen: append the items of the table that no event has.

    Raises:
        DataError: nothing is known about the items, ids of another type than the log's, or no item in common.
    """
    vocab = loaded.dataset.vocab
    table = loaded.items if items is None else items
    if table is None and vocab.titles is not None:
        table = item_frame(pl.Series(vocab.items), pl.Series(vocab.titles))
    if table is None:
        raise DataError("items: the data set came with no titles and no other text; name an item table")
    order = pl.DataFrame({"item": vocab.items})
    if table["item"].dtype != order["item"].dtype:
        raise DataError(
            f"items: expected ids of type {order['item'].dtype}, as in the log, got {table['item'].dtype}, "
            f"such as {table['item'].head(1).to_list()}"
        )
    known = table.unique("item", keep="first", maintain_order=True)
    if not order["item"].is_in(known["item"].implode()).any():
        some = known["item"].head(1).to_list()
        raise DataError(f"items: no item of the log is in the item table, whose ids look like {some}")
    described = order.join(known, on="item", how="left", maintain_order="left")
    if not unseen:
        return described
    return pl.concat([described, known.join(order, on="item", how="anti", maintain_order="left")])
