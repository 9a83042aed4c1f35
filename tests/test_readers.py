"""Every format, plain and packed: the exact frame comes out, or an error that names the file and the line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from fastm2rec.data import DataError, read_items, read_log
from fastm2rec.data.readers import ITEM_FORMATS, LOG_FORMATS, detect_format


@dataclass(frozen=True)
class Case:
    """A small file of a format, and the rows that it holds."""

    format: str
    name: str
    content: bytes
    rows: list[tuple]
    options: dict[str, Any] = field(default_factory=dict)


def _parquet(columns: dict[str, list]) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    return buffer.getvalue()


REVIEWS_2014 = (
    '{"reviewerID": "A1", "asin": "0001", "reviewText": "\\"no\\"\\n", "overall": 5.0, "unixReviewTime": 1252800000}\n'
    '{"reviewerID": "A2", "asin": "B\\u00e9", "helpful": [0, 2], "overall": 1.0, "unixReviewTime": 1252800001}\n'
)
REVIEWS_2018 = (
    '{"overall": 4.0, "verified": true, "reviewTime": "12 19, 2008", "reviewerID": "A1", "asin": "B01", '
    '"style": {"Gift Amount:": " 50"}, "unixReviewTime": 1229644800}\n'
    '{"verified": false, "reviewerID": "A2", "asin": "B01", "unixReviewTime": 1229644801}\n'
)
REVIEWS_LITERAL = "{'reviewerID': 'A1', 'asin': \"B'1\", 'overall': 5, 'unixReviewTime': 7, 'reviewText': u'\\u00e9'}\n"

LOGS = [
    Case(
        "movielens-dat", "ratings.dat", b"1::1193::5::978300760\n2::661::3.5::978302109\n\n",
        [(1, 1193, 978300760, 5.0), (2, 661, 978302109, 3.5)],
    ),
    Case(
        "movielens-100k", "u.data", b"196\t242\t3\t881250949\r\n186\t302\t3\t891717742\r\n",
        [(196, 242, 881250949, 3.0), (186, 302, 891717742, 3.0)],
    ),
    Case(
        "amazon", "Beauty_5.json", REVIEWS_2014.encode(),
        [("A1", "0001", 1252800000, 5.0), ("A2", "Bé", 1252800001, 1.0)],
    ),
    Case(
        "amazon", "Gift_Cards_5.jsonl", REVIEWS_2018.encode(),
        [("A1", "B01", 1229644800, 4.0), ("A2", "B01", 1229644801, None)],
    ),
    Case("amazon", "reviews_Old.json", REVIEWS_LITERAL.encode(), [("A1", "B'1", 7, 5.0)]),
    Case(
        "amazon", "mixed.json", (REVIEWS_LITERAL + REVIEWS_2018).encode(),
        [("A1", "B'1", 7, 5.0), ("A1", "B01", 1229644800, 4.0), ("A2", "B01", 1229644801, None)],
    ),
    Case(
        "foursquare", "dataset_TSMC2014_NYC.txt",
        "470\t49bb\t4bf5\tCafé\t40.7\t-74.0\t-240\tTue Apr 03 18:00:09 +0000 2012\n"
        "9\t4a43\t\tBar\t40.6\t-74.0\t-300\tSat Feb 16 02:35:36 +0000 2013\n".encode("latin-1"),
        [(470, "49bb", 1333476009), (9, "4a43", 1360982136)],
    ),
    Case(
        "gowalla", "loc-gowalla_totalCheckins.txt",
        b"0\t2010-10-19T23:55:27Z\t30.23\t-97.79\t22847\n0\t2010-10-18T22:17:43Z\t30.26\t-97.76\t420315\n",
        [(0, 22847, 1287532527), (0, 420315, 1287440263)],
    ),
    Case(
        "sequences", "user_sequence.txt", "A1 B01 B02\n\nA2\tBé  B01\n".encode(),
        [("A1", "B01", None), ("A1", "B02", None), ("A2", "Bé", None), ("A2", "B01", None)],
    ),
    Case(
        "recbole", "ml.inter",
        b"item_id:token\tuser_id:token\tnumber:float\ttimestamp:float\trating:float\n7\ta\t1\t978300760.0\t4\n8\tb\t2\t5\t3\n",
        [("a", 7, 978300760, 4.0), ("b", 8, 5, 3.0)],
    ),
    Case("recbole", "x.inter", b"user_id:token\titem_id:token\nx\t01\n", [("x", "01", None)]),
    Case(
        "table", "x.csv", '\ufeffuser,number,item,timestamp\n"a,b",1,"x\n""y""",5\n\nc,2,z,6.0\n'.encode(),
        [("a,b", 'x\n"y"', 5), ("c", "z", 6)],
    ),
    Case(
        "table", "x.tsv", b"who\twhat\twhen\tstars\n1\t2\t2020-01-01T00:00:01Z\t4\n3\t4\t2020-01-02T00:00:00Z\t5\n",
        [(1, 2, 1577836801, 4.0), (3, 4, 1577923200, 5.0)],
        {"user": "who", "item": "what", "timestamp": "when", "rating": "stars"},
    ),
    Case("table", "days.csv", b"user|item|timestamp\n1|2|1970-01-02\n", [(1, 2, 86400)], {"separator": "|"}),
    Case("table", "untimed.csv", b"user,item\n1,-2\n", [(1, -2, None)], {"timestamp": None}),
    Case(
        "table", "x.parquet",
        _parquet({"user": ["a", "b"], "item": [3, 4], "timestamp": [datetime(1970, 1, 1, 0, 1), datetime(2020, 1, 1)]}),
        [("a", 3, 60), ("b", 4, 1577836800)],
    ),
    Case(
        "table", "days.parquet", _parquet({"user": [1], "item": [3], "timestamp": [date(1970, 1, 3)], "r": [2]}),
        [(1, 3, 172800, 2.0)], {"rating": "r"},
    ),
    # Larger than an Int64 holds: such ids stay strings.
    Case("table", "big.parquet", _parquet({"user": [2**63], "item": [1], "timestamp": [1]}), [(str(2**63), 1, 1)]),
]  # fmt: skip

_FLAGS = "|".join("1" if place in (3, 4) else "0" for place in range(19))
META_2014 = '{"asin": "B1", "title": "Soap &amp; more ", "categories": [["Beauty", "Bath"]], "brand": "X"}\n'
META_2018 = (
    '{"asin": "B2", "title": "\\ud83c\\udf81", "category": ["Gift Cards"], "description": ["one", "two"]}\n'
    '{"asin": "B1", "title": "a later line does not count"}\n{"asin": "B3", "title": "", "brand": null}\n'
)
META_LITERAL = "{'asin': 'B4', 'title': '\\ud83c\\udf81', 'categories': [['Beauty']]}\n"

ITEMS = [
    Case(
        "movielens-dat", "movies.dat", "1::Misérables, Les (1995)::Drama|Musical\n2::\x85::Comedy\n".encode("latin-1"),
        [(1, "Misérables, Les (1995)", ["Drama", "Musical"], None, None), (2, "\x85", ["Comedy"], None, None)],
    ),
    Case(
        "movielens-100k", "u.item", f"1|Café (1995)|01-Jan-1995||http://x|{_FLAGS}\n".encode("latin-1"),
        [(1, "Café (1995)", ["Animation", "Children's"], None, None)],
    ),
    Case(
        "amazon", "meta_X.json", (META_2014 + META_2018 + META_LITERAL).encode(),
        [
            ("B1", "Soap & more", ["Beauty", "Bath"], "X", None),
            ("B2", "\U0001f381", ["Gift Cards"], None, "one two"),
            ("B3", None, None, None, None),
            ("B4", "\U0001f381", ["Beauty"], None, None),
        ],
    ),
    Case(
        "foursquare", "dataset_TSMC2014_NYC.txt",
        "".join(
            f"1\t{venue}\t\t{category}\t0\t0\t0\tTue Apr 03 18:00:09 +0000 2012\n"
            for venue, category in [("w", "Bar"), ("v", "Café"), ("w", "Deli"), ("w", "Deli"), ("v", "Bar")]
        ).encode("latin-1"),
        [("v", "Café", ["Café"], None, None), ("w", "Deli", ["Deli"], None, None)],
    ),
    Case(
        "recbole", "x.item", b"item_id:token\tmovie_title:token_seq\tclass:token_seq\n5\tToy Story\tAnimation Comedy\n",
        [(5, "Toy Story", ["Animation", "Comedy"], None, None)],
    ),
    Case("table", "x.csv", b'item,title\n1,"One, two"\n2,\n', [(1, "One, two", None, None, None), (2,) + 4 * (None,)]),
]  # fmt: skip


def _id(case: Case) -> str:
    return f"{case.format}-{case.name}"


def _frame(rows: list[tuple], schema: dict[str, Any]) -> pl.DataFrame:
    """The rows with these columns; ids are whole numbers or strings as the rows have them."""
    kinds: dict[str, Any] = {
        name: pl.Int64 if isinstance(rows[0][place], int) else pl.String
        for place, name in enumerate(schema) if name in ("user", "item")
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema | kinds, orient="row")


def _log(rows: list[tuple]) -> pl.DataFrame:
    schema: dict[str, Any] = {"user": None, "item": None, "timestamp": pl.Int64, "rating": pl.Float64}
    return _frame(rows, dict(list(schema.items())[: len(rows[0])]))


def _items(rows: list[tuple]) -> pl.DataFrame:
    schema = {"item": None, "title": pl.String, "categories": pl.List(pl.String), "brand": pl.String}
    return _frame(rows, schema | {"description": pl.String})


def _zip(members: dict[str, bytes]) -> bytes:
    """An archive of ``members``, the same bytes at every call: they are parameters, hence names, of tests."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _odd_zip() -> bytes:
    """An archive packed by a method that does not exist."""
    return _zip({"x": b"u a b\n"}).replace(b"\x08\x00", b"\x63\x00")


def _put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _pack(folder: Path, case: Case, ending: str) -> Path:
    packed = {"": case.content, ".gz": gzip.compress(case.content), ".zip": _zip({f"in/{case.name}": case.content})}
    return _put(folder, case.name + ending, packed[ending])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all examples of a property; a function's own would be shared by them without being asked."""
    return tmp_path_factory.mktemp("readers")


@pytest.mark.parametrize("ending", ["", ".gz", ".zip"])
@pytest.mark.parametrize("case", LOGS, ids=_id)
def test_logs(tmp_path: Path, case: Case, ending: str) -> None:
    frame = read_log(_pack(tmp_path, case, ending), case.format, **case.options)
    assert_frame_equal(frame, _log(case.rows))


@pytest.mark.parametrize("ending", ["", ".gz", ".zip"])
@pytest.mark.parametrize("case", ITEMS, ids=_id)
def test_items(tmp_path: Path, case: Case, ending: str) -> None:
    assert_frame_equal(read_items(_pack(tmp_path, case, ending), case.format, **case.options), _items(case.rows))


def test_every_format_has_an_example() -> None:
    assert {case.format for case in LOGS} == LOG_FORMATS.keys()
    assert {case.format for case in ITEMS} == ITEM_FORMATS.keys()


@pytest.mark.parametrize("case", [case for case in LOGS if case.name != "mixed.json"], ids=_id)
def test_the_name_tells_the_format(case: Case) -> None:
    for ending in ("", ".gz", ".zip"):
        assert detect_format(f"some/folder/{case.name}{ending}") == case.format


def test_the_member_of_an_archive_is_found_by_its_usual_name(tmp_path: Path) -> None:
    members = {"ml-100k/": b"", "ml-100k/README": b"?", "ml-100k/u.data": LOGS[1].content, "__MACOSX/._x": b"?"}
    path = _put(tmp_path, "ml-100k.zip", _zip({**members, "ml-100k/u.item": ITEMS[1].content}))
    assert_frame_equal(read_log(path), _log(LOGS[1].rows))
    assert_frame_equal(read_items(path, "movielens-100k"), _items(ITEMS[1].rows))
    with pytest.raises(
        DataError, match=r"ml-100k.zip: expected ratings.dat in the archive, got ml-100k/README, .*u.item"
    ):
        read_log(path, "movielens-dat")
    with pytest.raises(DataError, match="ml-100k.zip: expected a single file in the archive, got "):
        read_log(path, "sequences")
    with pytest.raises(DataError, match="ml-100k.zip: expected u.data in the archive, got nothing"):
        read_log(_put(tmp_path, "ml-100k.zip", _zip({})))


GOOD_REVIEW = '{"reviewerID": "u", "asin": "a", "unixReviewTime": 5}\n'
CHECKIN = "1\tv\t\tBar\t0\t0\t0\tTue Apr 03 18:00:09 +0000 2012\n"
TIMED = "user_id:token\titem_id:token\ttimestamp:float\n"
MALFORMED = [
    ("movielens-dat", "1::2::3::4\n1::2::3\n", r"2: expected 4 fields separated by '::' \(user, item, .*got '1::2::3'"),
    ("movielens-dat", "1::2::3::4\n\n1::2::3::4x\n", "3: expected an integer as timestamp, got '4x'"),
    ("movielens-dat", "1::2::3::99999999999999999999\n", "1: expected an integer as timestamp, got '9999"),
    ("movielens-dat", "1::2::nan::4\n", "1: expected a number as rating, got 'nan'"),
    ("movielens-dat", "1::2.5::3::4\n", "1: expected an integer as item, got '2.5'"),
    ("movielens-100k", "1\t2\t3\t4\n::\n", r"2: expected 4 fields separated by '\\t'"),
    ("movielens-100k", "1\t\t3\t4\n", "1: expected an integer as item, got ''"),
    ("amazon", GOOD_REVIEW + '{"reviewerID": "u",\n', "2: expected a JSON object, got '{\"reviewerID\": \"u\",'"),
    ("amazon", GOOD_REVIEW + "__import__('os').system('true')\n", "2: expected a JSON object, got \"__import__"),
    ("amazon", "[1]\n", r"1: expected a JSON object, got '\[1\]'"),
    ("amazon", "[" * 100_000, "1: expected a JSON object, got"),
    ("amazon", GOOD_REVIEW + '{"reviewerID": "u", "unixReviewTime": 5}\n', r"2: expected asin \(str\), got None"),
    ("amazon", GOOD_REVIEW.replace('"u"', '""'), r"1: expected reviewerID \(str\), got ''"),
    ("amazon", GOOD_REVIEW.replace('"u"', r'"\ud800"'), r"1: expected reviewerID \(str\), got '\\ud800'"),
    ("amazon", GOOD_REVIEW.replace("5", "5.5"), r"1: expected unixReviewTime \(int\), got 5.5"),
    ("amazon", GOOD_REVIEW.replace("5", '"5"'), r"1: expected unixReviewTime \(int\), got '5'"),
    ("amazon", GOOD_REVIEW.replace("5", "1" * 40), r"1: expected unixReviewTime \(int\), got 1111"),
    ("amazon", GOOD_REVIEW.replace("5", '5, "overall": "4"'), r"1: expected overall \(a number\), got '4'"),
    ("foursquare", CHECKIN + CHECKIN.replace("Apr", "May"), "2: expected a UTC time such as 'Tue Apr 03 .*, got"),
    ("foursquare", CHECKIN.replace("\tv\t", "\t\t"), "1: expected an id as item, got nothing"),
    ("foursquare", CHECKIN.replace("\tBar", ""), "1: expected 8 fields"),
    ("foursquare", CHECKIN.replace("1\tv", "x\tv"), "1: expected an integer as user, got 'x'"),
    ("gowalla", "0\t2010-10-19 23:55:27\t0\t0\t1\n", "1: expected a time such as '2010-10-19T23:.*, got '2010"),
    ("gowalla", "0\t2010-10-19T23:55:27Z\t0\t0\n", r"1: expected 5 fields separated by '\\t'"),
    ("sequences", "u a b\n\n v \n", "3: expected a user and at least one item, got ' v '"),
    ("recbole", "user_id\titem_id\n1\t2\n", "1: expected a header of distinct 'name:type' fields .*, got 'user_id"),
    ("recbole", "user_id:token\tuser_id:token\n1\t2\n", "1: expected a header of distinct 'name:type' fields"),
    ("recbole", "user_id:token\n1\n", "1: expected a field item_id, got none"),
    ("recbole", "user_id:token\titem_id:token\n1\t2\n1\n", r"3: expected 2 fields .*\(user_id, item_id\)"),
    ("recbole", "user_id:token\titem_id:token\n\t2\n", "2: expected an id as user_id, got nothing"),
    ("recbole", TIMED + "1\t2\tnan\n", "2: expected a number as timestamp, got 'nan'"),
    ("recbole", TIMED + "1\t2\t1e300\n", "2: expected a number of seconds as timestamp"),
    ("table", "user,item,timestamp\n1,2,3\n1,2,3,4\n", "3: expected 3 fields separated by ',', got 4"),
    ("table", 'user,item,timestamp\n"a\nb",2,3\n\n,2,3\n', "5: expected an id as user, got nothing"),
    ("table", '\nuser,item,timestamp\n1,"",3\n', "3: expected an id as item, got nothing"),
    ("table", "user,item,timestamp\n1,2,3\n1,2,\n", "3: expected a number or an ISO time as timestamp, got None"),
    ("table", "user,item,timestamp\n1,2,2020-01-01\n1,2,3\n", "3: expected a time as timestamp, got '3'"),
    ("table", "user,item,timestamp\n1,2,2020-01-01\n1,2,2020-13-01\n", "3: expected a time as timestamp, got"),
    ("table", "user,item,timestamp\n1,2,1e300\n", "2: expected a number or an ISO time as timestamp, got '1e300'"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "message"), MALFORMED)
def test_a_malformed_line_is_named(tmp_path: Path, format: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"bad\.x, line {message}"):
        read_log(_put(tmp_path, "bad.x", text.encode()), format)


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("movielens-dat", "1::One::Drama\nx::Two::Drama\n", "2: expected an integer as item, got 'x'"),
        ("movielens-dat", "1::One\n", r"1: expected 3 fields separated by '::' \(item, title, genres\)"),
        ("movielens-100k", f"1|One||||{_FLAGS}|0\n", r"1: expected 24 fields separated by '\|'"),
        ("amazon", META_2014 + '{"title": "x"}\n', r"2: expected asin \(str\), got None"),
        ("amazon", "{'asin': open('x')}\n", "1: expected a JSON object, got"),
        ("recbole", "item_id:token\tprice:float\n1\t2\n", "1: expected a field one of title, movie_title"),
        ("recbole", "item_id:token\ttitle:token\n\tx\n", "2: expected an id as item_id, got nothing"),
        ("table", "item,title\n,x\n", "2: expected an id as item, got nothing"),
    ],
)
def test_a_malformed_item_is_named(tmp_path: Path, format: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"bad\.x, line {message}"):
        read_items(_put(tmp_path, "bad.x", text.encode()), format)


@pytest.mark.parametrize(
    ("format", "name", "content", "message"),
    [
        ("sequences", "x.gz", gzip.compress(b"u a b\n" * 9, mtime=0)[:-9], "x.gz: truncated or not .*end-of-stream"),
        ("sequences", "x.gz", b"u a b\n", r"x.gz: truncated or not a .gz file: Not a gzipped file"),
        ("sequences", "x.gz", gzip.compress(b"u a b\n", mtime=0) + b"more", "x.gz: truncated or not a .gz file"),
        ("sequences", "x.zip", _zip({"x": b"u a b\n"})[:-9], r"x.zip: truncated or not a .zip file"),
        ("sequences", "x.zip", _odd_zip(), "x.zip: cannot be unpacked: .*not supported"),
        ("sequences", "x.txt", b"u a\nu b\nu \xff\n", "x.txt, line 3: expected utf-8 text, got byte 0xff"),
        ("table", "x.csv", b"user,item\nu,\xff\n", "x.csv, line 2: expected utf-8 text, got byte 0xff"),
        ("table", "x.csv", b"\n \n", "x.csv: expected a header line, got an empty file"),
        ("table", "x.csv", b"user,item,timestamp\n", "x.csv: expected at least one interaction, got none"),
        ("table", "x.csv", b'user,item,timestamp\n"1,2,3\n', "x.csv: not CSV: "),
        ("table", "x.csv", b"who,item\n1,2\n", "x.csv: no column user='user', timestamp='timest.*are who, item"),
        ("table", "x.parquet", b"PAR1", "x.parquet: not a Parquet file"),
        ("recbole", "x.inter", b"", "x.inter: expected a header such as"),
        ("recbole", "x.inter", TIMED.encode(), "x.inter: expected at least one interaction, got none"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_one(tmp_path: Path, format: str, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_log(_put(tmp_path, name, content), format)


@pytest.mark.parametrize("format", ["movielens-dat", "movielens-100k", "amazon", "foursquare", "gowalla", "sequences"])
def test_an_empty_file_is_no_log(tmp_path: Path, format: str) -> None:
    with pytest.raises(DataError, match="x.txt: expected at least one interaction, got none"):
        read_log(_put(tmp_path, "x.txt", b"\n"), format)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("user", [1], r"expected integers or strings as user, got List\(Int64\)"),
        ("item", b"\xff", "expected integers or strings as item, got Binary"),
        ("item", None, "line 1: expected an id as item, got nothing"),
        ("timestamp", time(1), "expected numbers, dates or texts as timestamp, got Time"),
        ("timestamp", timedelta(1), "expected numbers, dates or texts as timestamp, got Duration"),
        ("timestamp", [1], r"expected numbers, dates or texts as timestamp, got List\(Int64\)"),
        ("timestamp", float("nan"), "line 1: expected a number of seconds as timestamp, got nan"),
        ("timestamp", None, "line 1: expected a number or an ISO time as timestamp, got None"),
        ("rating", [1], r"expected numbers as rating, got List\(Int64\)"),
    ],
)
def test_columns_of_the_wrong_type(tmp_path: Path, column: str, value: object, message: str) -> None:
    columns = {"user": [1], "item": [1], "timestamp": [1], "rating": [1]} | {column: [value]}
    with pytest.raises(DataError, match=rf"x\.parquet.*{message}"):
        read_log(_put(tmp_path, "x.parquet", _parquet(columns)), rating="rating")


def test_what_is_no_file_or_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent.gz: no such file"):
        read_log(tmp_path / "absent.gz", "sequences")
    with pytest.raises(DataError, match="Is a directory"):
        read_log(tmp_path, "sequences")
    with pytest.raises(DataError, match="data.bin: the name tells no format; give one of movielens-dat, "):
        read_log(tmp_path / "data.bin")
    with pytest.raises(DataError, match="format: expected one of auto, movielens-dat, .*got 'xml'"):
        read_log(tmp_path / "data.bin", "xml")
    with pytest.raises(DataError, match="format: expected one of movielens-dat, .*got 'gowalla'"):
        read_items(tmp_path / "data.bin", "gowalla")
    path = _put(tmp_path, "x.csv", b"user::item\n1::2\n")
    with pytest.raises(DataError, match="separator: expected a single ASCII character, got '::'"):
        read_log(path, separator="::")


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    data = bytearray(_zip({"x": b"u a\n"}))
    data[6] |= 1  # the flag in the local header
    data[data.rfind(b"PK\x01\x02") + 8] |= 1  # and in the directory
    with pytest.raises(DataError, match="x.zip: cannot be unpacked: .*encrypted"):
        read_log(_put(tmp_path, "x.zip", bytes(data)), "sequences")


def test_ids_are_integers_only_where_all_are_written_as_one(tmp_path: Path) -> None:
    for last, kind in [("7", pl.Int64), ("-7", pl.Int64), ("07", pl.String), ("+7", pl.String), ("x", pl.String)]:
        log = read_log(_put(tmp_path, "x.txt", f"u 1 2 {last}\n".encode()), "sequences")
        assert log["item"].dtype == kind
        assert [str(item) for item in log["item"]] == ["1", "2", last]


seconds = st.integers(0, 4_000_000_000)
whole = st.integers(-(10**18) + 1, 10**18 - 1)
# The letter keeps them from being read as integers.
words = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), max_size=6).map("B".__add__)
anything = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6).map("B".__add__)
latin = st.text(st.characters(codec="latin-1", exclude_characters="\r\n\t"), max_size=6).map("B".__add__)


def _dat(rows: list[tuple]) -> str:
    return "".join(f"{user}::{item}::3::{when}\n" for user, item, when in rows)


def _u_data(rows: list[tuple]) -> str:
    return "".join(f"{user}\t{item}\t3\t{when}\n" for user, item, when in rows)


def _json(rows: list[tuple]) -> str:
    keys = ("reviewerID", "asin", "unixReviewTime")
    return "".join(
        json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=len(row[0]) % 2 == 0) + "\n" for row in rows
    )


def _literals(rows: list[tuple]) -> str:
    return "".join(f"{dict(zip(('reviewerID', 'asin', 'unixReviewTime'), row, strict=True))}\n" for row in rows)


def _checkins(rows: list[tuple]) -> str:
    stamp = "%a %b %d %H:%M:%S +0000 %Y"
    return "".join(f"{u}\t{i}\t\tBar\t0\t0\t0\t{datetime.fromtimestamp(t, UTC):{stamp}}\n" for u, i, t in rows)


def _gowalla(rows: list[tuple]) -> str:
    return "".join(f"{u}\t{datetime.fromtimestamp(t, UTC):%Y-%m-%dT%H:%M:%SZ}\t0\t0\t{i}\n" for u, i, t in rows)


def _inter(rows: list[tuple]) -> str:
    lines = ["user_id:token\titem_id:token\ttimestamp:float", *("\t".join(map(str, row)) for row in rows)]
    return "\n".join(lines)


def _csv(rows: list[tuple]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("user", "item", "timestamp"), *rows])
    return buffer.getvalue()


WRITERS: dict[str, tuple[str, Callable[[list[tuple]], str], st.SearchStrategy, st.SearchStrategy, str]] = {
    "dat": ("movielens-dat", _dat, whole, whole, "latin-1"),
    "u.data": ("movielens-100k", _u_data, whole, whole, "latin-1"),
    "json": ("amazon", _json, anything, anything, "utf-8"),
    "literals": ("amazon", _literals, anything, anything, "utf-8"),
    "foursquare": ("foursquare", _checkins, whole, latin, "latin-1"),
    "gowalla": ("gowalla", _gowalla, whole, whole, "utf-8"),
    "recbole": ("recbole", _inter, words, whole, "utf-8"),
    "csv": ("table", _csv, anything, whole, "utf-8"),
}


@pytest.mark.parametrize("writer", WRITERS)
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_what_was_written_is_read(place: Path, writer: str, data: st.DataObject) -> None:
    format, write, users, items, encoding = WRITERS[writer]
    rows = data.draw(st.lists(st.tuples(users, items, seconds), min_size=1, max_size=6))
    log = read_log(_put(place, "written.txt", write(rows).encode(encoding)), format)
    assert log.select("user", "item", "timestamp").rows() == rows


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=5)), min_size=1, max_size=6))
def test_sequences_that_were_written_are_read(place: Path, rows: list[tuple[str, list[str]]]) -> None:
    text = "\n".join(" ".join([user, *items]) for user, items in rows)
    log = read_log(_put(place, "written.txt", text.encode()), "sequences")
    assert log.select("user", "item").rows() == [(user, item) for user, items in rows for item in items]
    assert log["timestamp"].null_count() == len(log)


# Parquet is left out: polars reads it in native code, which some damage crashes together with the process.
EXAMPLES = [
    *((read_log, case) for case in LOGS if not case.name.endswith(".parquet")),
    *((read_items, case) for case in ITEMS),
]
SHARDS = [
    b"::", b"\t", b"|", b",", b" ", b"\n", b"\r\n", b"\r", b'"', b"'", b"{", b"}", b"[", b":", b"\\", b"\0", b"\xff",
    b"0", b"-1", b"1e999", b"nan", b"9" * 20, b"null", b"\\ud800", b"\xc3\xa9", b"2012", b"2020-02-30", b"user_id:",
]  # fmt: skip


def _read_or_refused(read: Callable[..., pl.DataFrame], path: Path, format: str, **options: Any) -> pl.DataFrame | None:
    """What is read, or None where a `DataError` says that it cannot be; other exceptions pass."""
    try:
        return read(path, format, **options)
    except DataError as error:
        if str(path) not in str(error):
            raise
        return None


@pytest.mark.parametrize(("read", "case"), EXAMPLES, ids=lambda value: _id(value) if isinstance(value, Case) else "")
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(
    place: Path, read: Callable[..., pl.DataFrame], case: Case, data: st.DataObject
) -> None:
    """Nothing but a `DataError` comes out of any bytes, and what is read has the columns and types it must have."""
    ending = data.draw(st.sampled_from(["", "", ".gz", ".zip"]))
    content = _pack(place, case, ending).read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, min(len(content), start + 12)))
        shard = data.draw(st.sampled_from(SHARDS) | st.binary(max_size=8))
        content = content[:start] + shard + content[stop:]
    path = _put(place, case.name + ending, content)
    frame = _read_or_refused(read, path, case.format, **case.options)
    if frame is None:
        return
    kinds = frame.schema
    assert kinds["item"] in (pl.Int64, pl.String)
    if read is read_log:
        assert len(frame)
        assert kinds["user"] in (pl.Int64, pl.String)
        assert kinds["timestamp"] == pl.Int64
        assert frame.select("user", "item").null_count().row(0) == (0, 0)
        assert frame["timestamp"].null_count() in (0, len(frame))


@pytest.mark.parametrize("format", LOG_FORMATS)
@settings(deadline=None, max_examples=50)
@given(st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(SHARDS), max_size=20).map(b"".join)))
def test_noise_is_read_or_refused(place: Path, format: str, content: bytes) -> None:
    frame = _read_or_refused(read_log, _put(place, "noise.txt", content), format)
    assert frame is None or len(frame)
