"""Amazon reviews and metadata, 2014 and 2018: one JSON object a line, or a Python literal in the oldest files."""

from __future__ import annotations

import ast
import html
import json
from typing import Any

import polars as pl

from ..storage import PathLike
from .delimited import item_frame, log_frame
from .files import DataError, read_lines


def amazon_reviews(path: PathLike) -> pl.DataFrame:
    """Raw reviews: `reviewerID`, `asin`, `unixReviewTime` and, where given, `overall`."""
    lines = read_lines(path)
    wanted = {"reviewerID": pl.String, "asin": pl.String, "unixReviewTime": pl.Int64, "overall": pl.Float64}
    try:
        frame = lines["line"].str.json_decode(pl.Struct(wanted)).struct.unnest()
    except pl.exceptions.PolarsError:
        frame = None
    if frame is None or frame.select("reviewerID", "asin", "unixReviewTime").null_count().sum_horizontal().item():
        # Not all of it is plain JSON of these types: read line by line, which also finds the line to complain about.
        records = [_review(number, _parse(number, line, path), path) for number, line in lines.iter_rows()]
        frame = pl.DataFrame(records, schema=wanted, orient="row")
    return log_frame(frame["reviewerID"], frame["asin"], frame["unixReviewTime"], frame["overall"])


def _review(number: int, record: dict[str, Any], path: PathLike) -> tuple[str, str, int, float | None]:
    for name, kind in (("reviewerID", str), ("asin", str), ("unixReviewTime", int)):
        if not isinstance(record.get(name), kind) or isinstance(record.get(name), bool):
            raise DataError(f"{path}, line {number}: expected {name} ({kind.__name__}), got {record.get(name)!r}")
    overall = record.get("overall")
    if not isinstance(overall, int | float | None):
        raise DataError(f"{path}, line {number}: expected overall (a number), got {overall!r}")
    return record["reviewerID"], record["asin"], record["unixReviewTime"], overall


def amazon_items(path: PathLike) -> pl.DataFrame:
    """Raw metadata: `asin`, `title`, `brand`, `description`, and `categories` (2014) or `category` (2018).

    HTML entities are resolved. Where an id is repeated, its first line counts.
    """
    rows: dict[str, tuple[str, str | None, list[str] | None, str | None, str | None]] = {}
    for number, line in read_lines(path).iter_rows():
        record = _parse(number, line, path)
        item = record.get("asin")
        if not isinstance(item, str):
            raise DataError(f"{path}, line {number}: expected asin (str), got {item!r}")
        categories = _flat(record.get("categories", record.get("category")))
        description = " ".join(_flat(record.get("description"))) or None
        rows.setdefault(
            item, (item, _text(record.get("title")), categories or None, _text(record.get("brand")), description)
        )
    schema: dict[str, Any] = {
        "item": pl.String, "title": pl.String, "categories": pl.List(pl.String), "brand": pl.String,
        "description": pl.String,
    }  # fmt: skip
    frame = pl.DataFrame(list(rows.values()), schema=schema, orient="row")
    return item_frame(frame["item"], frame["title"], frame["categories"], frame["brand"], frame["description"])


def _text(value: object) -> str | None:
    return (html.unescape(value).strip() or None) if isinstance(value, str) else None


def _flat(value: object) -> list[str]:
    """The strings in a value that may be a string, a list, or a list of lists."""
    if isinstance(value, list):
        return [text for part in value for text in _flat(part)]
    text = _text(value)
    return [] if text is None else [text]


def _parse(number: int, line: str, path: PathLike) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        try:
            record = ast.literal_eval(line.strip())  # evaluates literals only, never code
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise DataError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}")
    return record
