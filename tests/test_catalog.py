"""Data sets by name: small folders as their publishers lay them out, and the real files with the published counts."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from fastm2rec import StorageError
from fastm2rec.data import (
    NAMES,
    DataError,
    Loaded,
    PrefixSamples,
    SequenceDataset,
    TextTable,
    align,
    load_dataset,
    load_text_table,
    order,
    read_items,
    read_log,
    save_text_table,
    synthetic,
)

RATINGS = "".join(f"{user}\t{item}\t3\t{item}\n" for user in (7, 8) for item in (1, 2, 3))
CHECKINS = "".join(
    f"{user}\tv{venue}\t\tBar\t0\t0\t0\tTue Apr 03 18:00:0{venue} +0000 2012\n"
    for user in (7, 8)
    for venue in (1, 2, 3)
)
FLAGS = "|".join("0" * 19)
REVIEWS = "".join(
    f'{{"reviewerID": "{user}", "asin": "{item}", "unixReviewTime": {ord(item)}}}\n' for user in "uv" for item in "abc"
)
FOLDERS: dict[str, dict[str, str]] = {
    "ml-100k": {"u.data": RATINGS, "u.item": f"2|Two||||{FLAGS}\n", "u.user": "x", "README": "x"},
    "ml-1m": {
        "ratings.dat": RATINGS.replace("\t", "::"), "movies.dat": "2::Two::Drama\n", "users.dat": "x",
    },
    "amazon-beauty": {"user_sequence.txt": "u a b c\nv a b c\n", "meta_Beauty.json": '{"asin": "b", "title": "Two"}\n'},
    "amazon": {"reviews_Beauty.json": REVIEWS, "meta_Beauty.json": '{"asin": "b", "title": "Two"}\n'},
    "foursquare-nyc": {"dataset_TSMC2014_NYC.txt": CHECKINS},
    "gowalla": {
        "loc-gowalla_totalCheckins.txt":
            "".join(f"{user}\t2010-10-1{item}T00:00:00Z\t0\t0\t{item}\n" for user in (7, 8) for item in (3, 2, 1)),
    },
    "recbole": {
        "x.inter": "user_id:token\titem_id:token\ttimestamp:float\n" + RATINGS.replace("\t3\t", "\t"),
        "x.item": "item_id:token\ttitle:token_seq\n2\tTwo\n",
    },
    "sequences": {"x.txt": "u 1 2 3\nv 1 2 3\n"},
    "table": {"x.csv": "user,item,rating,timestamp\n" + RATINGS.replace("\t", ",")},
}  # fmt: skip


def _folder(place: Path, files: dict[str, str], ending: str = "") -> Path:
    place.mkdir(exist_ok=True)
    for name, text in files.items():
        if ending and name.endswith(tuple(files)):
            (place / f"{name}{ending}").write_bytes(gzip.compress(text.encode()))
        else:
            (place / name).write_text(text)
    return place


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_as_its_publisher_lays_it_out(tmp_path: Path, name: str, ending: str) -> None:
    folder = _folder(tmp_path, FOLDERS[name], ending)
    loaded = load_dataset(name, folder, user_min=3, item_min=2)
    dataset = loaded.dataset
    assert (dataset.n_users, dataset.n_items, len(dataset.items)) == (2, 3, 6)
    assert dataset.items.tolist() == [1, 2, 3, 1, 2, 3]
    titled = {"foursquare-nyc": ["Bar"] * 3}.get(name, ["", "Two", ""] if len(FOLDERS[name]) > 1 else None)
    assert dataset.vocab.titles == titled
    assert all(Path(file).parent == folder for file in loaded.files)
    assert len(loaded.files) == (1 if titled is None or name == "foursquare-nyc" else 2)
    assert (loaded.text, loaded.text_source) == (None, None)
    one_file = load_dataset(name, loaded.files[0], user_min=3, item_min=2)
    assert one_file.files == loaded.files[:1]
    assert one_file.dataset.fingerprint() == dataset.fingerprint()


def test_every_name_has_a_folder_here() -> None:
    assert {*FOLDERS, "synthetic", "prepared"} == set(NAMES)


@pytest.mark.parametrize("name", ["ml-100k", "ml-1m"])
def test_the_archives_of_grouplens(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
        for member, text in FOLDERS[name].items():
            archive.writestr(f"{name}/{member}", text)
    packed = load_dataset(name, tmp_path, user_min=0, item_min=0)
    assert packed.files == (str(tmp_path / f"{name}.zip"),)
    assert packed.dataset.vocab.titles == ["", "Two", ""]
    _folder(tmp_path / name, FOLDERS[name])
    unpacked = load_dataset(name, tmp_path, user_min=0, item_min=0)
    assert unpacked.files[0].startswith(str(tmp_path / name))
    assert unpacked.dataset.fingerprint() == packed.dataset.fingerprint()


def test_reviews_and_metadata_of_one_ending_are_told_apart(tmp_path: Path) -> None:
    files = FOLDERS["amazon"]
    folder = _folder(
        tmp_path, {"Beauty.jsonl": files["reviews_Beauty.json"], "meta_Beauty.jsonl": files["meta_Beauty.json"]}
    )
    loaded = load_dataset("amazon", folder, user_min=0, item_min=0)
    assert loaded.files == (str(folder / "Beauty.jsonl"), str(folder / "meta_Beauty.jsonl"))
    assert loaded.dataset.vocab.titles == ["", "Two", ""]


def test_the_core_is_a_choice(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"x.txt": "u 1 2 3\nv 1 2\nw 1\n"})
    assert load_dataset("sequences", folder, user_min=0, item_min=0).dataset.n_users == 3
    assert load_dataset("sequences", folder, user_min=2, item_min=2).dataset.statistics()["events"] == 4
    assert load_dataset("sequences", folder, user_min=3, item_min=0).dataset.users == ["u"]
    with pytest.raises(DataError, match="no user with 5 and item with 5 events is left of 6 events"):
        load_dataset("sequences", folder)


def test_columns_of_a_table_are_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"x.tsv": "who\twhat\n" + "".join(f"u\t{item}\n" for item in range(5))})
    options: dict[str, Any] = {"user": "who", "item": "what", "timestamp": None}
    assert load_dataset("table", folder, user_min=5, item_min=1, **options).dataset.n_items == 5
    with pytest.raises(DataError, match="x.tsv: no column user='user', item='item', timestamp='timestamp'"):
        load_dataset("table", folder)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset: expected one of ml-100k, .*synthetic, prepared, got 'netflix'"):
        load_dataset("netflix", tmp_path)
    with pytest.raises(DataError, match="data: expected the folder of ml-100k, got none"):
        load_dataset("ml-100k")
    with pytest.raises(DataError, match="absent: no such file or folder"):
        load_dataset("ml-100k", tmp_path / "absent")
    with pytest.raises(DataError, match="no file of ml-1m; looked for ratings.dat, .*ml-1m.zip"):
        load_dataset("ml-1m", tmp_path)
    _folder(tmp_path, {"a.txt": "u 1\n", "b.txt": "u 1\n"})
    with pytest.raises(DataError, match="expected one file of sequences, got a.txt, b.txt"):
        load_dataset("sequences", tmp_path)
    with pytest.raises(StorageError, match="cannot read .*sequences.safetensors: no such file"):
        load_dataset("prepared", tmp_path)


def test_text_is_found_named_or_left(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"x.txt": "u 1 2 3\n"})
    load: dict[str, Any] = {"user_min": 0, "item_min": 0}
    assert load_dataset("sequences", folder, text="auto", **load).text is None
    save_text_table(folder / "text.safetensors", TextTable([3, 1], torch.tensor([[3.0], [1.0]])))
    found = load_dataset("sequences", folder, text="auto", **load)
    assert found.text is not None
    assert found.text.table.tolist() == [[0], [1], [0], [3]]
    assert found.text.missing == 1
    assert found.text_source == str(folder / "text.safetensors")
    assert load_dataset("sequences", folder / "x.txt", text="auto", **load).text_source == found.text_source
    assert load_dataset("sequences", folder, **load).text is None
    other = tmp_path / "other.safetensors"
    save_text_table(other, TextTable(["1"], torch.ones(1, 2)))
    with pytest.raises(DataError, match="other.safetensors: expected item ids of type int, as in the log, got str"):
        load_dataset("sequences", folder, text=str(other), **load)
    with pytest.raises(DataError, match="absent.npz: .*no such file"):
        load_dataset("sequences", folder, text=str(tmp_path / "absent.npz"), **load)


def test_a_prepared_folder_is_what_was_loaded(tmp_path: Path) -> None:
    made = load_dataset("ml-100k", _folder(tmp_path / "raw", FOLDERS["ml-100k"]), user_min=0, item_min=0)
    made.dataset.save(tmp_path / "new")
    again = load_dataset("prepared", tmp_path / "new")
    assert again.dataset.fingerprint() == made.dataset.fingerprint()
    assert again.dataset.vocab == made.dataset.vocab
    assert again.dataset.users == made.dataset.users
    assert again.files == (str(tmp_path / "new" / "sequences.safetensors"),)


def test_synthetic_needs_no_folder() -> None:
    sizes: dict[str, Any] = {"n_users": 30, "n_items": 28, "length": 20, "text_dim": 6}
    loaded = load_dataset("synthetic", text="auto", **sizes)
    assert loaded.dataset.n_users == 30
    assert loaded.text is not None
    assert loaded.text.missing == 0
    rows = loaded.dataset.vocab.items
    assert torch.equal(loaded.text.table[1:], synthetic(**sizes).text[torch.tensor(rows)])
    assert loaded.text_source == "synthetic"
    assert load_dataset("synthetic", **sizes).text is None
    assert loaded.dataset.vocab.title(rows[0]) == f"Item {rows[0]} of group {(int(rows[0]) - 1) % 7}"


def _counts(log: pl.DataFrame) -> tuple[int, int, int]:
    return len(log), log["user"].n_unique(), log["item"].n_unique()


@pytest.fixture(scope="module")
def ml_1m(shared_data: Path) -> pl.DataFrame:
    """The million ratings, parsed once."""
    return read_log(shared_data / "ml-1m" / "ratings.reconstructed.dat.gz", "movielens-dat")


def test_ml_1m(shared_data: Path, ml_1m: pl.DataFrame) -> None:
    assert _counts(ml_1m) == (1_000_209, 6_040, 3_706)
    stars = ml_1m["rating"].value_counts(sort=False).sort("rating")
    assert stars["count"].to_list() == [56_174, 107_557, 261_197, 348_971, 226_310]
    assert (ml_1m["timestamp"].min(), ml_1m["timestamp"].max()) == (956703932, 1046454590)
    assert ml_1m.select("user", "item").n_unique() == 1_000_209
    movies = read_items(shared_data / "ml-1m" / "movies.dat.gz", "movielens-dat")
    assert len(movies) == movies["item"].n_unique() == 3_883
    assert movies["title"].null_count() == 0
    assert movies.filter(item=73)["title"].item() == "Misérables, Les (1995)"
    assert not len(ml_1m.join(movies, on="item", how="anti"))


def test_ml_1m_as_sequences(ml_1m: pl.DataFrame) -> None:
    dataset = SequenceDataset.from_log(ml_1m)
    assert dataset.users == list(range(1, 6_041))
    ordered = order(ml_1m)
    assert dataset.vocab.decode(dataset.items[:1000].tolist()) == ordered["item"][:1000].to_list()
    assert ordered.select((pl.col("timestamp").diff().over("user") < 0).any()).item() is False
    # Every user has at least 20 ratings: two are held out and the first is never a target.
    assert len(PrefixSamples(dataset, 200)) == 1_000_209 - 3 * 6_040
    assert len(PrefixSamples(dataset, 200, "test")) == 6_040


def test_ml_100k(shared_data: Path) -> None:
    log = read_log(shared_data / "ml-100k" / "u.data.gz")
    assert _counts(log) == (100_000, 943, 1_682)
    assert log.row(0) == (196, 242, 881250949, 3.0)
    items = read_items(shared_data / "ml-100k" / "u.item.gz", "movielens-100k")
    assert len(items) == 1_682
    assert items.row(0) == (1, "Toy Story (1995)", ["Animation", "Children's", "Comedy"], None, None)
    assert items.filter(item=543)["title"].item() == "Misérables, Les (1995)"


def test_amazon_beauty(shared_data: Path) -> None:
    folder = shared_data / "amazon-beauty"
    log = read_log(folder / "user_sequence.txt.gz")
    assert _counts(log) == (198_502, 22_363, 12_101)
    meta = read_items(folder / "meta_Beauty_5core.json.gz", "amazon")
    assert len(meta) == 12_101
    assert meta["title"].null_count() == 7
    assert len(meta) - meta["brand"].null_count() == 10_021 - 18  # so many of the 10,021 are empty
    assert set(meta["item"]) == set(log["item"])
    # It is its own 5-core.
    loaded = load_dataset("amazon-beauty", folder)
    assert loaded.dataset.statistics() | {"density": 0} == {
        "users": 22_363, "items": 12_101, "events": 198_502, "mean_length": 8.88, "median_length": 6, "density": 0,
    }  # fmt: skip
    assert loaded.dataset.vocab.titles is not None
    assert loaded.dataset.vocab.titles.count("") == 7


def test_amazon_giftcards(shared_data: Path) -> None:
    folder = shared_data / "amazon-giftcards"
    log = read_log(folder / "Gift_Cards_5.json.gz")
    assert _counts(log) == (2_972, 458, 148)
    assert log["timestamp"].is_between(1325376000, 1546300800).all()  # 2012 to 2018
    assert log["rating"].is_between(1, 5).all()
    meta = read_items(folder / "meta_Gift_Cards.json.gz", "amazon")
    assert not len(log.join(meta, on="item", how="anti"))
    with gzip.open(folder / "meta_Gift_Cards.json.gz", "rt", encoding="utf-8") as lines:
        assert sum(1 for _ in lines) == 1_547
    assert meta["title"].null_count() == 0
    loaded = load_dataset("amazon", folder, user_min=0, item_min=0)
    assert len(loaded.files) == 2
    assert len(loaded.dataset.items) == 2_972


def test_foursquare(shared_data: Path) -> None:
    path = shared_data / "foursquare-nyc" / "dataset_TSMC2014_NYC.subset.txt.gz"
    log = read_log(path)
    assert _counts(log) == (113_344, 1_082, 4_988)
    assert log["timestamp"].is_sorted()
    venues = read_items(path, "foursquare")
    assert len(venues) == 4_988
    assert venues["title"].n_unique() == 204
    assert any("é" in title for title in venues["title"])  # latin-1


TEXTS = {"ml-100k": 1_682, "ml-1m": 3_706, "amazon-beauty": 12_101, "foursquare-nyc": 4_988}


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_tables_fit_their_logs(shared_data: Path, request: pytest.FixtureRequest, name: str) -> None:
    path = shared_data / name / "text_minilm.npz"
    if name == "ml-1m":
        dataset = SequenceDataset.from_log(request.getfixturevalue("ml_1m"))
        loaded = Loaded(dataset, (), align(load_text_table(path), dataset.vocab, path), str(path))
    else:
        loaded = load_dataset(name, path.parent, user_min=0, item_min=0, text="auto")
    assert loaded.text_source == str(path)
    assert loaded.text is not None
    assert loaded.text.missing == 0
    assert loaded.text.table.shape == (TEXTS[name] + 1, 384)
    assert not loaded.text.table[0].any()
    # The rows were of unit norm before they were rounded to half precision, which changes a norm by 2^-11 at most.
    norms = loaded.text.table[1:].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=2.0**-11)
    with np.load(path) as arrays:
        place = {item: row for row, item in enumerate(arrays["item_ids"].tolist())}
        for dense in (1, TEXTS[name] // 2, TEXTS[name]):
            row = arrays["embeddings"][place[loaded.dataset.vocab.items[dense - 1]]]
            assert loaded.text.table[dense].tolist() == row.tolist()
