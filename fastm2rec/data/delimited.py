"""Logs and item tables whose lines are fields between separators: MovieLens, Foursquare, Gowalla, sequences, RecBole.

Every reader returns all of a file or raises a `DataError` that names the line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from ..storage import PathLike
from ._polars import pl
from .files import (
    NUMBER,
    DataError,
    cast_column,
    decode,
    natural_ids,
    read_bytes,
    read_lines,
    read_parquet,
    refuse,
    require_ids,
    split_fields,
)

LOG_COLUMNS = ("user", "item", "timestamp", "rating")

# The 19 genres of u.item, in the order of its flags (the file u.genre).
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


def log_frame(user: pl.Series, item: pl.Series, timestamp: pl.Series | None, rating: pl.Series | None) -> pl.DataFrame:
    """A log in the package's form: `user`, `item` (Int64 or String), `timestamp` (Int64, null if none), `rating`."""
    columns = [natural_ids(user).alias("user"), natural_ids(item).alias("item")]
    if timestamp is None:
        timestamp = pl.Series([None], dtype=pl.Int64).new_from_index(0, len(user))
    columns.append(timestamp.cast(pl.Int64).alias("timestamp"))
    if rating is not None:
        columns.append(rating.cast(pl.Float64).alias("rating"))
    return pl.DataFrame(columns)


def _numeric_log(frame: pl.DataFrame, path: PathLike) -> pl.DataFrame:
    for name, dtype in (("user", pl.Int64), ("item", pl.Int64), ("rating", pl.Float64), ("timestamp", pl.Int64)):
        frame = cast_column(frame, name, dtype, path)
    return log_frame(frame["user"], frame["item"], frame["timestamp"], frame["rating"])


def movielens_dat(path: PathLike) -> pl.DataFrame:
    """ratings.dat of MovieLens 1M and 10M: `UserID::MovieID::Rating::Timestamp`."""
    lines = read_lines(path, "latin-1", ["ratings.dat"])
    return _numeric_log(split_fields(lines, "::", ["user", "item", "rating", "timestamp"], path), path)


def movielens_100k(path: PathLike) -> pl.DataFrame:
    """u.data of MovieLens 100K: user, item, rating, timestamp between tabs."""
    lines = read_lines(path, "latin-1", ["u.data"])
    return _numeric_log(split_fields(lines, "\t", ["user", "item", "rating", "timestamp"], path), path)


def item_frame(
    item: pl.Series,
    title: pl.Series,
    categories: pl.Series | None = None,
    brand: pl.Series | None = None,
    description: pl.Series | None = None,
) -> pl.DataFrame:
    """An item table in the package's form; what a format lacks is null."""
    size = len(item)

    def empty(dtype: pl.DataType | type[pl.DataType]) -> pl.Series:
        return pl.Series([None], dtype=dtype).new_from_index(0, size)

    return pl.DataFrame(
        [
            natural_ids(item).alias("item"),
            title.cast(pl.String).alias("title"),
            (empty(pl.List(pl.String)) if categories is None else categories).alias("categories"),
            (empty(pl.String) if brand is None else brand).alias("brand"),
            (empty(pl.String) if description is None else description).alias("description"),
        ]
    )


def movielens_dat_items(path: PathLike) -> pl.DataFrame:
    """movies.dat, latin-1: `MovieID::Title::Genre|Genre`."""
    frame = split_fields(read_lines(path, "latin-1", ["movies.dat"]), "::", ["item", "title", "genres"], path)
    frame = cast_column(frame, "item", pl.Int64, path)
    return item_frame(frame["item"], frame["title"], frame["genres"].str.split("|"))


def movielens_100k_items(path: PathLike) -> pl.DataFrame:
    """u.item, latin-1: 24 columns between `|`, the last 19 of them flags of genres."""
    flags = [f"genre {genre}" for genre in GENRES_100K]
    names = ["item", "title", "release", "video release", "url", *flags]
    frame = split_fields(read_lines(path, "latin-1", ["u.item"]), "|", names, path)
    frame = cast_column(frame, "item", pl.Int64, path)
    genres = frame.select(
        pl.concat_list(
            pl.when(pl.col(flag) == "1").then(pl.lit(genre)) for flag, genre in zip(flags, GENRES_100K, strict=True)
        ).list.drop_nulls()
    ).to_series()
    return item_frame(frame["item"], frame["title"], genres)


_FOURSQUARE = ["user", "item", "category id", "category", "latitude", "longitude", "offset", "time"]


def _foursquare(path: PathLike) -> pl.DataFrame:
    members = ["dataset_TSMC2014_NYC.txt", "dataset_TSMC2014_TKY.txt"]
    frame = split_fields(read_lines(path, "latin-1", members), "\t", _FOURSQUARE, path)
    require_ids(frame, "item", path)
    return frame


def foursquare(path: PathLike) -> pl.DataFrame:
    """Foursquare TSMC2014 check-ins, latin-1, 8 columns between tabs; times like `Tue Apr 03 18:00:09 +0000 2012`."""
    frame = cast_column(_foursquare(path), "user", pl.Int64, path)
    # The offset is always +0000; without it the format is one that polars parses as a plain date and time.
    text = frame["time"].str.strip_chars().str.replace("+0000 ", "", literal=True)
    time = text.str.to_datetime("%a %b %d %H:%M:%S %Y", strict=False)
    wanted = "a UTC time such as 'Tue Apr 03 18:00:09 +0000 2012'"
    refuse(frame, time.is_null(), path, lambda row: f"expected {wanted}, got {row['time']!r}")
    return log_frame(frame["user"], frame["item"], time.dt.epoch("s"), None)


def foursquare_items(path: PathLike) -> pl.DataFrame:
    """The venues of a check-in file; a venue's title is the category name that it carries most often."""
    counts = _foursquare(path).group_by("item", "category", maintain_order=True).len()
    named = counts.sort("len", descending=True, maintain_order=True).unique("item", keep="first", maintain_order=True)
    named = named.sort("item")
    return item_frame(named["item"], named["category"], named.select(pl.concat_list("category")).to_series())


def gowalla(path: PathLike) -> pl.DataFrame:
    """SNAP's Gowalla check-ins: user, ISO time, latitude, longitude, location id between tabs (newest first)."""
    names = ["user", "time", "latitude", "longitude", "item"]
    frame = split_fields(read_lines(path, "utf-8", ["loc-gowalla_totalCheckins.txt"]), "\t", names, path)
    frame = cast_column(cast_column(frame, "user", pl.Int64, path), "item", pl.Int64, path)
    time = frame["time"].str.strip_chars().str.to_datetime("%Y-%m-%dT%H:%M:%SZ", strict=False)
    wanted = "a time such as '2010-10-19T23:55:27Z'"
    refuse(frame, time.is_null(), path, lambda row: f"expected {wanted}, got {row['time']!r}")
    return log_frame(frame["user"], frame["item"], time.dt.epoch("s"), None)


def sequences(path: PathLike) -> pl.DataFrame:
    """One user a line, `user item item ...`, items in time order; there are no timestamps."""
    lines = read_lines(path)
    parts = lines["line"].str.extract_all(r"\S+")
    short = parts.list.len() < 2
    refuse(lines, short, path, lambda row: f"expected a user and at least one item, got {row['line']!r}")
    frame = pl.DataFrame({"user": parts.list.first(), "item": parts.list.slice(1)}).explode("item")
    return log_frame(frame["user"], frame["item"], None, None)


def _recbole(path: PathLike, wanted: dict[str, str]) -> dict[str, pl.Series]:
    """The columns of an atomic file that `wanted` names: field name there to name here."""
    lines = read_lines(path)
    if lines.is_empty():
        raise DataError(f"{path}: expected a header such as 'user_id:token\\titem_id:token', got an empty file")
    header = [field.partition(":") for field in lines["line"][0].split("\t")]
    names = [name for name, _, _ in header]
    if not all(colon for _, colon, _ in header) or len(set(names)) != len(names):
        raise DataError(
            f"{path}, line {lines[NUMBER][0]}: expected a header of distinct 'name:type' fields between tabs, "
            f"got {lines['line'][0]!r}"
        )
    frame = split_fields(lines[1:], "\t", names, path)
    found = {}
    for theirs, ours in wanted.items():
        if theirs in names:
            if ours in ("user", "item", "item_id"):
                require_ids(frame, theirs, path)
            elif ours in ("timestamp", "rating"):
                frame = cast_column(frame, theirs, pl.Float64, path)
            if ours == "timestamp":
                _seconds(frame, theirs, path)
            found[ours] = frame[theirs]
    return found


def recbole(path: PathLike) -> pl.DataFrame:
    """RecBole's atomic .inter file: a header of `name:type` fields, then values, between tabs."""
    fields = {"user_id": "user", "item_id": "item", "timestamp": "timestamp", "rating": "rating"}
    columns = _recbole(path, fields)
    for theirs, ours in (("user_id", "user"), ("item_id", "item")):
        if ours not in columns:
            raise DataError(f"{path}, line 1: expected a field {theirs}, got none")
    return log_frame(columns["user"], columns["item"], columns.get("timestamp"), columns.get("rating"))


RECBOLE_TITLES = ("title", "movie_title", "name", "item_name")
RECBOLE_CATEGORIES = ("categories", "category", "class", "genre", "genres")


def recbole_items(path: PathLike) -> pl.DataFrame:
    """RecBole's atomic .item file; the title is the first of the fields title, movie_title, name, item_name."""
    wanted = {name: name for name in ("item_id", *RECBOLE_TITLES, *RECBOLE_CATEGORIES, "brand")}
    columns = _recbole(path, wanted)
    title = next((columns[name] for name in RECBOLE_TITLES if name in columns), None)
    if "item_id" not in columns or title is None:
        missing = "item_id" if "item_id" not in columns else f"one of {', '.join(RECBOLE_TITLES)}"
        raise DataError(f"{path}, line 1: expected a field {missing}, got none")
    categories = next((columns[name].str.split(" ") for name in RECBOLE_CATEGORIES if name in columns), None)
    return item_frame(columns["item_id"], title, categories, columns.get("brand"))


def table(
    path: PathLike,
    user: str = "user",
    item: str = "item",
    timestamp: str | None = "timestamp",
    rating: str | None = None,
    separator: str | None = None,
) -> pl.DataFrame:
    """Any CSV, TSV or Parquet file with named columns.

    Args:
        path: .csv, .tsv or .parquet, the first two also packed.
        user, item: names of the columns.
        timestamp: name of a column of numbers (what is behind the point is cut off), dates or ISO times; None takes
            the order of the file.
        rating: name of a column of numbers, or None.
        separator: between fields; by default a tab for .tsv and a comma otherwise.
    """
    frame = _table(path, separator)
    names = {"user": user, "item": item, "timestamp": timestamp, "rating": rating}
    missing = [f"{ours}={theirs!r}" for ours, theirs in names.items() if theirs is not None and theirs not in frame]
    if missing:
        columns = [name for name in frame.columns if name != NUMBER]
        raise DataError(f"{path}: no column {', '.join(missing)}; the columns are {', '.join(columns)}")
    for name in (user, item):
        require_ids(frame, name, path)
    times = None if timestamp is None else _times(frame, timestamp, path)
    if rating is not None and frame[rating].dtype == pl.String:
        frame = cast_column(frame, rating, pl.Float64, path)
    elif rating is not None and not frame[rating].dtype.is_numeric():
        raise DataError(f"{path}: expected numbers as {rating}, got {frame[rating].dtype}")
    return log_frame(frame[user], frame[item], times, None if rating is None else frame[rating])


def table_items(path: PathLike, item: str = "item", title: str = "title", separator: str | None = None) -> pl.DataFrame:
    """An item table from any CSV, TSV or Parquet file with columns of these names.

    Columns `categories` (a list, or text with `|` between the parts), `brand` and `description` are taken if present.
    """
    frame = _table(path, separator)
    missing = [name for name in (item, title) if name not in frame]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; the columns are {', '.join(frame.columns[1:])}")
    require_ids(frame, item, path)
    found = {name: frame[name] for name in ("categories", "brand", "description") if name in frame}
    if "categories" in found and found["categories"].dtype == pl.String:
        found["categories"] = found["categories"].str.split("|")
    return item_frame(frame[item], frame[title], **found)


def _table(path: PathLike, separator: str | None) -> pl.DataFrame:
    """All columns (strings, but for Parquet) and `NUMBER`, the line or row of each."""
    if separator is not None and len(separator.encode()) != 1:
        raise DataError(f"separator: expected a single ASCII character, got {separator!r}")
    name = str(path).removesuffix(".gz").removesuffix(".zip")
    if name.endswith(".parquet"):
        return read_parquet(path).with_row_index(NUMBER, offset=1)
    text = decode(read_bytes(path), path, "utf-8")
    separator = separator or ("\t" if name.endswith(".tsv") else ",")
    if text.strip() == "":
        raise DataError(f"{path}: expected a header line, got an empty file")
    try:
        frame = pl.read_csv(io.StringIO(text), separator=separator, infer_schema=False)
        return _numbered_rows(frame, text)
    except pl.exceptions.PolarsError as error:
        raise _csv_error(text, separator, path, error) from None


def _numbered_rows(frame: pl.DataFrame, text: str) -> pl.DataFrame:
    """The rows that are not blank lines, with the lines of the file on which they begin."""
    first = 2 + text[: len(text) - len(text.lstrip("\r\n"))].count("\n") + "".join(frame.columns).count("\n")
    within = pl.sum_horizontal(pl.all().str.count_matches("\n", literal=True).fill_null(0))  # in quoted fields
    begins = frame.select(within.cum_sum().shift(1, fill_value=0)).to_series() + pl.int_range(
        first, first + len(frame), eager=True
    )
    numbered = pl.DataFrame({NUMBER: begins}).hstack(frame)
    return numbered.filter(~pl.all_horizontal(pl.exclude(NUMBER).is_null()))


def _csv_error(text: str, separator: str, path: PathLike, error: Exception) -> DataError:
    """The line that polars could not read, found by a slower parser."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        header = next(reader, [])
        for row in reader:
            if len(row) > len(header):
                expected = f"{len(header)} fields separated by {separator!r}"
                return DataError(f"{path}, line {reader.line_num}: expected {expected}, got {len(row)}")
    except csv.Error as cause:
        return DataError(f"{path}, line {reader.line_num}: not CSV: {cause}")
    return DataError(f"{path}: not CSV: {str(error).splitlines()[0]}")


_TIME_FORMATS: Sequence[str] = (
    "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d",
)  # fmt: skip


def _seconds(frame: pl.DataFrame, name: str, path: PathLike) -> pl.Series:
    """A column of numbers as integers; what is null stays so.

    Raises:
        DataError: the first line whose value is too large for 64 bits, or not a number.
    """
    column = frame[name]
    whole = column.cast(pl.Int64, strict=False)
    wrong = whole.is_null() & column.is_not_null()
    refuse(frame, wrong, path, lambda row: f"expected a number of seconds as {name}, got {row[name]!r}")
    return whole


def _times(frame: pl.DataFrame, name: str, path: PathLike) -> pl.Series:
    column = frame[name]
    if column.dtype in (pl.Date, pl.Datetime):
        return column.cast(pl.Datetime("us")).dt.epoch("s")
    if column.dtype.is_numeric():
        return _seconds(frame, name, path)
    if column.dtype not in (pl.String, pl.Null):
        raise DataError(f"{path}: expected numbers, dates or texts as {name}, got {column.dtype}")
    column = column.cast(pl.String)
    numbers = column.str.strip_chars().cast(pl.Int64, strict=False)
    if numbers.null_count():
        numbers = column.str.strip_chars().cast(pl.Float64, strict=False).cast(pl.Int64, strict=False)
    if not numbers.null_count():
        return numbers
    for layout in _TIME_FORMATS:
        times = column.str.strip_chars().str.to_datetime(layout, strict=False)
        if times.null_count() < len(times):  # the column is in this layout; a value that is not is an error
            refuse(frame, times.is_null(), path, lambda row: f"expected a time as {name}, got {row[name]!r}")
            return times.dt.epoch("s")
    refuse(frame, numbers.is_null(), path, lambda row: f"expected a number or an ISO time as {name}, got {row[name]!r}")
    return numbers
