"""From a path to lines of text: plain, .gz and .zip files, in the format's own encoding, numbered for errors."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from ..storage import PathLike
from ._polars import pl

# The column of line numbers. No field of a file can have this name, for no header line holds a line end.
NUMBER = "\nnumber"


class DataError(ValueError):
    """Data that cannot be read: the message names the file, the line where there is one, and what was expected."""


def read_bytes(path: PathLike, members: Sequence[str] = ()) -> bytes:
    """The unpacked content of a file.

    Args:
        path: a plain file, a .gz file, or a .zip archive.
        members: names that the format's file usually has, to choose from an archive of several.

    Raises:
        DataError: no such file, a truncated or corrupt archive, or one in which no member, or more than one, fits.
    """
    path = Path(path)
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        if path.suffix == ".zip":
            return _read_zip(path, members)
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except DataError:
        raise
    except (
        EOFError,
        ValueError,
        zlib.error,
        lzma.LZMAError,
        struct.error,
        gzip.BadGzipFile,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(f"{path}: truncated or not a {path.suffix} file: {error}") from None
    except RuntimeError as error:  # an archive with a password, or packed in an unusual way
        raise DataError(f"{path}: cannot be unpacked: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _read_zip(path: Path, members: Sequence[str]) -> bytes:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
        fitting = [name for name in names if Path(name).name in members] or names
        if len(fitting) != 1:
            wanted = " or ".join(members) if members else "a single file"
            raise DataError(f"{path}: expected {wanted} in the archive, got {', '.join(names) or 'nothing'}")
        return archive.read(fitting[0])


def read_parquet(path: PathLike) -> pl.DataFrame:
    """A Parquet file, plain or packed.

    Raises:
        DataError: it is none, or damaged.
    """
    try:
        return pl.read_parquet(io.BytesIO(read_bytes(path)))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:  # some damage makes polars panic
        raise DataError(f"{path}: not a Parquet file: {error}") from None


def decode(data: bytes, path: PathLike, encoding: str) -> str:
    """`data` as text, without a byte-order mark.

    Raises:
        DataError: bytes that are not of that encoding, with the line.
    """
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: expected {encoding} text, got byte 0x{data[error.start]:02x}") from None


def read_lines(path: PathLike, encoding: str = "utf-8", members: Sequence[str] = ()) -> pl.DataFrame:
    """The lines of a file that are not blank: columns `NUMBER` (from 1) and `line`, without line ends."""
    # split, not splitlines: titles hold characters that Python, but no file format, takes for line ends.
    lines = pl.Series("line", decode(read_bytes(path, members), path, encoding).split("\n"), dtype=pl.String)
    frame = pl.DataFrame({NUMBER: pl.int_range(1, len(lines) + 1, eager=True), "line": lines})
    frame = frame.with_columns(pl.col("line").str.strip_suffix("\r"))
    return frame.filter(pl.col("line").str.strip_chars() != "")


def split_fields(lines: pl.DataFrame, separator: str, names: Sequence[str], path: PathLike) -> pl.DataFrame:
    """Split every line into exactly the named fields, as strings; `NUMBER` is kept.

    Raises:
        DataError: the first line with another number of fields.
    """
    found = lines.select(pl.col("line").str.count_matches(separator, literal=True) + 1).to_series()
    refuse(
        lines,
        found != len(names),
        path,
        lambda row: (
            f"expected {len(names)} fields separated by {separator!r} ({', '.join(names)}), got {row['line']!r}"
        ),
    )
    fields = lines["line"].str.split_exact(separator, len(names) - 1).struct.rename_fields(list(names))
    return lines.select(NUMBER).hstack(fields.struct.unnest())


def cast_column(frame: pl.DataFrame, name: str, dtype: pl.DataType | type[pl.DataType], path: PathLike) -> pl.DataFrame:
    """Turn a string column into numbers.

    Raises:
        DataError: the first line whose value is no such number, or not finite.
    """
    cast = frame[name].str.strip_chars().cast(dtype, strict=False)
    kind = "an integer" if dtype == pl.Int64 else "a number"
    wrong = cast.is_null() | ~cast.is_finite().fill_null(False)
    refuse(frame, wrong, path, lambda row: f"expected {kind} as {name}, got {row[name]!r}")
    return frame.with_columns(cast.alias(name))


def require_ids(frame: pl.DataFrame, name: str, path: PathLike) -> None:
    """Raise a DataError about the first line without an id in this column, or about its type."""
    column = frame[name]
    if column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object):
        raise DataError(f"{path}: expected integers or strings as {name}, got {column.dtype}")
    empty = column.is_null() | (column.cast(pl.String) == "").fill_null(False)
    refuse(frame, empty, path, lambda row: f"expected an id as {name}, got nothing")


def refuse(frame: pl.DataFrame, wrong: pl.Series, path: PathLike, message: Callable[[dict], str]) -> None:
    """Raise a DataError about the first row that is marked as wrong, if there is one."""
    if wrong.any():
        row = frame.row(wrong.arg_max() or 0, named=True)
        raise DataError(f"{path}, line {row[NUMBER]}: {message(row)}")


def natural_ids(column: pl.Series) -> pl.Series:
    """Ids as integers where every one of them is written as one (no leading zero or plus sign), else as strings."""
    if column.dtype.is_integer():
        whole = column.cast(pl.Int64, strict=False)
        return whole if whole.null_count() == column.null_count() else column.cast(pl.String)
    text = column.cast(pl.String)
    if len(text) and text.str.contains(r"^(?:0|-?[1-9][0-9]{0,17})$").all():
        return text.cast(pl.Int64)
    return text
