"""Amazon reviews and metadata, 2014 and 2018: one JSON object a line, or a Python literal in the oldest files."""

from __future__ import annotations

import ast
import html
import json
from typing import Any, TypeGuard

from ..storage import PathLike
from ._polars import pl
from .delimited import item_frame, log_frame
from .files import DataError, read_lines


def amazon_reviews(path: PathLike) -> pl.DataFrame:
    """Raw reviews: `reviewerID`, `asin`, `unixReviewTime` and, where given, `overall`."""
    lines = read_lines(path)
    frame = _decoded(lines)
    if frame is None:
        # Not all of it is plain JSON of these types: read line by line, which also finds the line to complain about.
        records = [_review(number, _parse(number, line, path), path) for number, line in lines.iter_rows()]
        frame = pl.DataFrame(records, schema=_review_types(), orient="row")
    return log_frame(frame["reviewerID"], frame["asin"], frame["unixReviewTime"], frame["overall"])


def _review_types() -> dict[str, type[pl.DataType]]:
    return {"reviewerID": pl.String, "asin": pl.String, "unixReviewTime": pl.Int64, "overall": pl.Float64}


def _decoded(lines: pl.DataFrame) -> pl.DataFrame | None:
    """The fields of JSON lines, read by polars; None where `_review` must have a look.

    polars turns a wrong type into the wanted one where it can, so times are read as floating point, which keeps the
    fraction that gives a wrong one away, and ids as they stand.
    """
    loose = pl.Struct(_review_types() | {"unixReviewTime": pl.Float64})
    try:
        frame = lines["line"].str.json_decode(loose).struct.unnest()
    except pl.exceptions.PolarsError:
        return None
    time = frame["unixReviewTime"]
    odd_id = pl.any_horizontal(pl.col("reviewerID", "asin").str.contains(r"^$|\x00"))  # \0: half a surrogate pair
    fits = (
        not frame.select("reviewerID", "asin", "unixReviewTime").null_count().sum_horizontal().item()
        and bool((time == time.floor()).all() and (time.abs() < 2**53).all())
        and not frame.select(odd_id.any()).item()
    )
    return frame.with_columns(time.cast(pl.Int64)) if fits else None


def _review(number: int, record: dict[str, Any], path: PathLike) -> tuple[str, str, int, float | None]:
    for name in ("reviewerID", "asin"):
        if not _is_id(record.get(name)):
            raise DataError(f"{path}, line {number}: expected {name} (str), got {record.get(name)!r}")
    time, overall = record.get("unixReviewTime"), record.get("overall")
    if not isinstance(time, int) or isinstance(time, bool) or abs(time) >= 2**63:
        raise DataError(f"{path}, line {number}: expected unixReviewTime (int), got {time!r}")
    if not isinstance(overall, int | float | None) or (overall is not None and not abs(overall) < 2**63):
        raise DataError(f"{path}, line {number}: expected overall (a number), got {overall!r}")
    return record["reviewerID"], record["asin"], time, overall


def _is_id(value: object) -> TypeGuard[str]:
    """A text that is not empty and holds no half of a surrogate pair, which no file could be written with."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= letter <= "\udfff" for letter in value)


def amazon_items(path: PathLike) -> pl.DataFrame:
    """Raw metadata: `asin`, `title`, `brand`, `description`, and `categories` (2014) or `category` (2018).

    HTML entities are resolved. Where an id is repeated, its first line counts.
    """
    rows: dict[str, tuple[str, str | None, list[str] | None, str | None, str | None]] = {}
    for number, line in read_lines(path).iter_rows():
        record = _parse(number, line, path)
        item = record.get("asin")
        if not _is_id(item):
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
    if not isinstance(value, str):
        return None
    whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # joins surrogate pairs
    return html.unescape(whole).strip() or None


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
