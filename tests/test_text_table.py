"""Tables of text embeddings: each format, their order by a vocabulary, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fastm2rec import StorageError, Vocabulary
from fastm2rec.data import DataError, TextTable, align, find_text_table, load_text_table, save_text_table
from fastm2rec.storage import write_json

Ids = list[int] | list[str]

EMBEDDINGS = np.array([[1.5, -2.0, 0.25], [0.0, 3.0, 65504.0]])  # exact in half precision too
INTEGERS: Ids = [30, 4]
STRINGS: Ids = ["B01", "é"]


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _parquet(ids: list, embeddings: list, **kinds: pl.DataType) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame({"item_id": ids, "embedding": embeddings}, schema_overrides=kinds).write_parquet(buffer)
    return buffer.getvalue()


def _put(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def _write_npz(folder: Path, ids: Ids, kind: type) -> Path:
    return _put(folder, "t.npz", _npz(item_ids=np.array(ids), embeddings=EMBEDDINGS.astype(kind)))


def _write_npz_bytes(folder: Path, ids: Ids, kind: type) -> Path:
    raw = np.array([item.encode() if isinstance(item, str) else item for item in ids])
    return _put(folder, "t.npz", _npz(item_ids=raw, embeddings=EMBEDDINGS.astype(kind)))


def _write_npy(folder: Path, ids: Ids, kind: type) -> Path:
    write_json(folder / "t.ids.json", ids)
    return _put(folder, "t.npy", _npy(np.asfortranarray(EMBEDDINGS.astype(kind))))


def _write_safetensors(folder: Path, ids: Ids, kind: type) -> Path:
    tensors = {"embeddings": torch.from_numpy(EMBEDDINGS.astype(kind))}
    if isinstance(ids[0], int):
        tensors["item_ids"] = torch.tensor(ids)
    else:
        write_json(folder / "t.ids.json", ids)
    return _put(folder, "t.safetensors", save(tensors))


def _write_parquet(folder: Path, ids: Ids, kind: type) -> Path:
    inner = pl.Float64 if kind is np.float64 else pl.Float32
    return _put(folder, "t.parquet", _parquet(ids, EMBEDDINGS.tolist(), embedding=pl.List(inner)))


def _write_parquet_of_fixed_width(folder: Path, ids: Ids, kind: type) -> Path:
    return _put(folder, "t.parquet", _parquet(ids, EMBEDDINGS.tolist(), embedding=pl.Array(pl.Float32, 3)))


WRITERS = [
    _write_npz, _write_npz_bytes, _write_npy, _write_safetensors, _write_parquet, _write_parquet_of_fixed_width,
]  # fmt: skip


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("ids", [INTEGERS, STRINGS], ids=["integers", "strings"])
@pytest.mark.parametrize("write", WRITERS)
def test_each_format_is_read(tmp_path: Path, write: Callable[[Path, Ids, type], Path], ids: Ids, kind: type) -> None:
    text = load_text_table(write(tmp_path, ids, kind))
    assert text.items == ids
    assert {type(item) for item in text.items} == {type(ids[0])}
    assert text.embeddings.dtype == torch.float32
    assert torch.equal(text.embeddings, torch.from_numpy(EMBEDDINGS).float())


def test_bfloat16_is_read(tmp_path: Path) -> None:
    tensors = {"embeddings": torch.tensor([[0.5], [2.0]]).bfloat16(), "item_ids": torch.tensor([1, 2])}
    text = load_text_table(_put(tmp_path, "t.safetensors", save(tensors)))
    assert text.embeddings.tolist() == [[0.5], [2.0]]


@pytest.mark.parametrize("ids", [INTEGERS, STRINGS], ids=["integers", "strings"])
def test_a_saved_table_comes_back(tmp_path: Path, ids: Ids) -> None:
    text = TextTable(list(ids), torch.randn(2, 5))
    save_text_table(tmp_path / "text.safetensors", text)
    loaded = load_text_table(tmp_path / "text.safetensors")
    assert loaded.items == text.items
    assert torch.equal(loaded.embeddings, text.embeddings)
    assert find_text_table(tmp_path) == tmp_path / "text.safetensors"
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        save_text_table(tmp_path / "file" / "text.safetensors", text)


GOOD, TWO = EMBEDDINGS.astype(np.float32), np.array([1, 2])
FLOATS = EMBEDDINGS.tolist()
REFUSED = [
    ("t.txt", b"", "expected a file ending in .safetensors, .npz, .npy, .parquet"),
    ("t.npz", _npz(embeddings=GOOD), "item_ids is not a file in the archive"),
    ("t.npz", _npz(item_ids=TWO), "embeddings is not a file in the archive"),
    ("t.npz", _npz(item_ids=TWO[:1], embeddings=GOOD), "expected one id per embedding, got 1 ids and 2 embeddings"),
    ("t.npz", _npz(item_ids=np.array([3, 3]), embeddings=GOOD), "item_ids: .*distinct ids, got 3 more than once"),
    ("t.npz", _npz(item_ids=TWO * 0.5, embeddings=GOOD), "item_ids: expected a vector of .*, got float64"),
    ("t.npz", _npz(item_ids=TWO[None], embeddings=GOOD), r"item_ids: expected a vector of .*, got int64 \(1, 2\)"),
    ("t.npz", _npz(item_ids=TWO, embeddings=GOOD[0]), r"expected floating point of shape \[n, T\], got float32 \(3,\)"),
    ("t.npz", _npz(item_ids=TWO, embeddings=GOOD[:, :0]), r"expected floating point .*, got float32 \(2, 0\)"),
    ("t.npz", _npz(item_ids=TWO, embeddings=GOOD.astype(int)), r"expected floating point of shape \[n, T\], got int64"),
    ("t.npz", _npz(item_ids=TWO, embeddings=GOOD * np.nan), "expected finite values, got NaN or infinity"),
    ("t.npz", _npz(item_ids=TWO, embeddings=EMBEDDINGS * 1e300), "expected finite values, got NaN or infinity"),
    ("t.npz", _npz(item_ids=TWO, embeddings=GOOD)[:-40], "not a table of text embeddings: File is not a zip file"),
    ("t.npz", _npz(item_ids=TWO, embeddings=GOOD).replace(GOOD.tobytes(), b"\1" * GOOD.nbytes), "Bad CRC-32"),
    ("t.npz", _npz(item_ids=np.array([1, "a"], dtype=object), embeddings=GOOD), "Object arrays cannot be loaded"),
    ("t.npz", _npz(item_ids=TWO, embeddings=GOOD.astype(object)), "Object arrays cannot be loaded"),
    ("t.npz", _npy(GOOD), "not an archive of arrays"),
    ("t.npz", b"", "not a table of text embeddings"),
    ("t.npy", _npy(GOOD.astype(object)), "Object arrays cannot be loaded"),
    ("t.npy", _npy(GOOD)[:-4], "not a table of text embeddings"),
    ("t.npy", _npz(item_ids=TWO, embeddings=GOOD), "not a single array"),
    ("t.npy", _npy(GOOD), "cannot read .*t.ids.json: No such file"),
    ("t.safetensors", save({"embeddings": torch.ones(2, 3)})[:-4], "truncated or not a safetensors file"),
    ("t.safetensors", save({"embeddings": torch.ones(2, 3)}), "cannot read .*t.ids.json: No such file"),
    ("t.safetensors", save({"item_ids": torch.ones(2)}), "'embeddings'"),
    ("t.safetensors", save({"embeddings": torch.ones(2, 3).long(), "item_ids": torch.tensor([1, 2])}), "got int64"),
    ("t.safetensors", save({"embeddings": torch.ones(2, 3), "item_ids": torch.tensor(1)}), r"got int64 \(\)"),
    ("t.safetensors", save({"embeddings": torch.ones(2, 3)}, {"item_ids": "[1, 2"}), "not a table .*delimiter"),
    ("t.safetensors", save({"embeddings": torch.ones(2, 3)}, {"item_ids": "7"}), "item_ids: expected a list .*got int"),
    ("t.safetensors", save({"embeddings": torch.ones(2, 3)}, {"item_ids": "[7]"}), "got 1 ids and 2 embeddings"),
    ("t.safetensors", save({"embeddings": torch.ones(2, 3)}, {"item_ids": "[7, 7]"}), "got 7 more than once"),
    ("t.parquet", b"PAR1", ": not a Parquet file"),
    ("t.parquet", _parquet([1, 2], [[1.0, 2.0], [3.0]]), r"embedding: expected lists of one length, got \[1, 2\]"),
    ("t.parquet", _parquet([1, 2], [[1.0, 2.0], None]), r"embedding: expected lists of one length, got \[None, 2\]"),
    ("t.parquet", _parquet([1, 2], [[1.0, 2.0], [None, 1.0]]), "expected floating point .*, got object"),
    ("t.parquet", _parquet([1, 2], ["a", "b"]), "not a table of text embeddings: expected List"),
    ("t.parquet", _parquet([1, 1], FLOATS), "item_ids: .*expected distinct ids, got 1 more than once"),
    ("t.parquet", _parquet([1, None], FLOATS), "item_ids: .*expected all int or all str"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        load_text_table(_put(tmp_path, name, content))


def test_a_parquet_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pl.DataFrame({"asin": [1], "embedding": [[1.0]]}).write_parquet(buffer)
    with pytest.raises(DataError, match="t.parquet: no column item_id; the columns are asin, embedding"):
        load_text_table(_put(tmp_path, "t.parquet", buffer.getvalue()))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"1": 0, "2": 1}, "t.ids.json: expected a list of ids, got dict"),
        (2, "t.ids.json: expected a list of ids, got int"),
        ([1, None], "expected all int or all str, got NoneType, int"),
        ([1, "2"], "expected all int or all str, got int, str"),
        ([[1], [2]], "expected all int or all str, got list"),
        ([1.0, 2.0], "expected all int or all str, got float"),
    ],
)
def test_ids_beside_a_table_that_are_none(tmp_path: Path, ids: object, message: str) -> None:
    write_json(tmp_path / "t.ids.json", ids)
    with pytest.raises(DataError, match=message):
        load_text_table(_put(tmp_path, "t.npy", _npy(GOOD)))


def test_an_absent_table_is_named(tmp_path: Path) -> None:
    for ending in (".npz", ".npy", ".safetensors", ".parquet"):
        with pytest.raises(DataError, match=f"absent{ending}: .*no such file|absent{ending}: no such file"):
            load_text_table(tmp_path / f"absent{ending}")


class Trap:
    """Unpickling it would be seen."""

    sprung = False

    def __reduce__(self) -> tuple:
        return setattr, (Trap, "sprung", True)


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_nothing_is_unpickled(tmp_path: Path, ending: str) -> None:
    trap = np.array([[Trap()]], dtype=object)
    write_json(tmp_path / "t.ids.json", [1])
    content = _npy(trap) if ending == ".npy" else _npz(item_ids=TWO[:1], embeddings=trap)
    with pytest.raises(DataError, match=f"t{ending}: .*Object arrays cannot be loaded when allow_pickle=False"):
        load_text_table(_put(tmp_path, f"t{ending}", content))
    assert not Trap.sprung


catalogue = st.lists(st.integers(0, 15), unique=True, min_size=1, max_size=10)


@settings(deadline=None)
@given(catalogue, catalogue)
def test_rows_come_in_the_order_of_the_vocabulary(described: list[int], known: list[int]) -> None:
    text = TextTable(list(described), torch.randn(len(described), 3))
    missing = [item for item in known if item not in described]
    if len(missing) == len(known):
        with pytest.raises(DataError, match="text: no item of the log is in the table, whose ids look like"):
            align(text, Vocabulary(known))
        return
    aligned = align(text, Vocabulary(known))
    rows = dict(zip(described, text.embeddings.tolist(), strict=True))
    assert aligned.table.tolist() == [[0.0] * 3, *(rows.get(item, [0.0] * 3) for item in known)]
    assert aligned.missing == len(missing)


def test_items_without_text_are_counted_wherever_they_are() -> None:
    text = TextTable([1, 2, 3], torch.tensor([[0.0, 0.0], [0.0, -1.0], [0.0, 0.0]]))
    assert align(text, Vocabulary([2, 3, 4])).missing == 2  # 3 has a zero row, 4 has none


def test_ids_of_another_type_are_refused() -> None:
    text = TextTable(["1", "2"], torch.ones(2, 3))
    with pytest.raises(DataError, match="t.npz: expected item ids of type int, as in the log, got str"):
        align(text, Vocabulary([1, 2]), "t.npz")


def test_the_table_of_a_folder(tmp_path: Path) -> None:
    assert find_text_table(tmp_path) is None
    for name in ("text.md", "text.ids.json", "other.npz"):
        (tmp_path / name).write_text("")
    assert find_text_table(tmp_path) is None
    (tmp_path / "text_minilm.npz").write_text("")
    assert find_text_table(tmp_path) == tmp_path / "text_minilm.npz"
    (tmp_path / "text.npy").write_text("")
    with pytest.raises(DataError, match="expected one text table, got text.npy, text_minilm.npz; name one"):
        find_text_table(tmp_path)
