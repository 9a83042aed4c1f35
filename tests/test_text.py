"""From metadata to a table of text embeddings: item tables, the cache, the encoders, and the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fastm2rec import StorageError
from fastm2rec.cli import main
from fastm2rec.data import DataError, load_dataset, load_text_table, read_items, save_text_table, synthetic
from fastm2rec.data.delimited import item_frame
from fastm2rec.storage import load_tensors
from fastm2rec.text import Template, embed_items, item_table, load_encoder
from fastm2rec.text.cache import EmbeddingCache
from tests._encoders import WIDTH, Invented, invented, row_of, small_model

ITEMS = item_frame(
    pl.Series(["a", "b", "c", "d", "e"]),
    pl.Series(["Soap", None, "A much longer title", "Soap", "Comb"]),
    brand=pl.Series(["", None, "Acme", None, "Acme"]),
)
TEXTS = ["Soap", "", "A much longer title. Brand: Acme", "Soap", "Comb. Brand: Acme"]


def test_rows_belong_to_their_items() -> None:
    made = embed_items(ITEMS, invented(prompt="say: "), progress=False)
    assert made.table.items == ["a", "b", "c", "d", "e"]
    expected = np.stack([row_of(f"say: {text}") if text else np.zeros(WIDTH) for text in TEXTS])
    assert np.array_equal(made.table.embeddings.numpy(), expected)
    assert (made.missing, made.texts, made.computed, made.example) == (1, 3, 3, "Soap")
    assert made.metadata["normalized"] == "false"
    assert made.metadata["prompt"] == "say: "
    assert made.metadata["items_without_text"] == "1"


def test_batches_hold_texts_of_a_length_each_once() -> None:
    titles = ["x" * (1 + 7 * i % 11) + str(i % 13) for i in range(40)]
    model = Invented()
    embed_items(
        item_frame(pl.Series(range(40)), pl.Series(titles)), invented(model=model), batch_size=4, progress=False
    )
    said = [text for batch in model.batches for text in batch]
    assert sorted(said) == sorted(set(titles))
    assert [len(text) for text in said] == sorted(map(len, said), reverse=True)
    assert {len(batch) for batch in model.batches[:-1]} == {4}


def test_no_text_is_embedded_twice_by_a_model(tmp_path: Path) -> None:
    def computed(items: pl.DataFrame, template: str = "{title}", version: str = "1", prompt: str = "") -> int:
        model = Invented()
        encoder = invented(version, prompt, model)
        made = embed_items(items, encoder, template, cache=tmp_path, progress=False)
        fresh = embed_items(items, invented(version, prompt), template, progress=False)
        assert torch.equal(made.table.embeddings, fresh.table.embeddings)
        assert made.computed == sum(map(len, model.batches))
        return made.computed

    assert computed(ITEMS) == 3
    assert computed(ITEMS) == 0
    assert computed(ITEMS, "{title}. {brand}") == 2, "Soap is known, whatever the template"
    assert computed(ITEMS, version="2") == 3
    assert computed(ITEMS, prompt="say: ") == 3
    assert computed(ITEMS.with_columns(title=pl.lit("new"))) == 1


KILLED = """
import os, signal, sys
from tests._encoders import Invented, invented
from tests.test_text import MANY
from fastm2rec.text import embed_items
class Deadly(Invented):
    def encode_document(self, texts, **options):
        if len(self.batches) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_document(texts, **options)
embed_items(MANY, invented(model=Deadly()), batch_size=8, cache=sys.argv[1], progress=False)
"""
MANY = item_frame(pl.Series(range(50)), pl.Series([f"title {i}" for i in range(50)]))


def test_a_killed_run_goes_on(tmp_path: Path, root: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    made = embed_items(MANY, invented(), cache=tmp_path, progress=False)
    assert made.computed == 50 - 3 * 8
    assert torch.equal(made.table.embeddings, embed_items(MANY, invented(), progress=False).table.embeddings)


def test_two_runs_share_a_cache(tmp_path: Path) -> None:
    one, two = EmbeddingCache(tmp_path, "m"), EmbeddingCache(tmp_path, "m")
    one.write({"a": np.ones(3, np.float32)})
    two.write({"b": np.zeros(3, np.float32), "a": np.ones(3, np.float32)})
    assert {text: row.tolist() for text, row in one.read(["a", "b", "c"]).items()} == {"a": [1.0] * 3, "b": [0.0] * 3}


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "embeddings.sqlite").write_bytes(b"not a database, though long enough to look like one" * 9)
    with pytest.raises(StorageError, match="embeddings.sqlite: not usable as a cache"):
        embed_items(ITEMS, invented(), cache=tmp_path, progress=False)
    with pytest.raises(StorageError, match="not usable as a cache"):
        EmbeddingCache(tmp_path / "embeddings.sqlite", "m")


class Broken(Invented):
    def encode_document(self, texts: list[str], **options: object) -> np.ndarray:
        return np.full((len(texts), WIDTH), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        (ITEMS, {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        (ITEMS, {"template": "{name}"}, "got the field {name}"),
        (ITEMS, {"template": "{description}"}, "none of 5 items has any of the fields of '{description}'"),
        (pl.concat([ITEMS, ITEMS]), {}, "expected a column item of distinct ids"),
        (ITEMS.drop("item"), {}, "expected a column item of distinct ids"),
        (ITEMS, {"model": invented(model=Broken())}, "model 'invented': expected finite embeddings"),
    ],
)
def test_what_cannot_be_embedded_is_refused(items: pl.DataFrame, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed_items(items, **{"model": invented(), "progress": False, **options})


def test_items_come_in_the_order_of_the_vocabulary(tmp_path: Path) -> None:
    loaded = load_dataset("synthetic", n_items=28, n_users=30)
    assert loaded.items is not None
    odd = loaded.items.filter(pl.col("item") % 2 == 1).reverse()
    more = pl.concat([odd, odd.head(1).with_columns(item=pl.lit(99, pl.Int64), title=pl.lit("unseen"))])
    table = item_table(loaded, more)
    assert table["item"].to_list() == loaded.dataset.vocab.items
    assert table["title"].to_list() == [f"Item {i} of group {(i - 1) % 7}" if i % 2 else None for i in range(1, 29)]
    assert item_table(loaded, more, unseen=True)["item"].to_list() == [*range(1, 29), 99]
    loaded.dataset.save(tmp_path)
    prepared = load_dataset("prepared", tmp_path)
    assert item_table(prepared)["title"].to_list() == loaded.items["title"].to_list()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (item_frame(pl.Series(["1"]), pl.Series(["t"])).with_columns(item=pl.lit("a")), "expected ids of type Int64"),
        (item_frame(pl.Series([500]), pl.Series(["t"])), "no item of the log is in the item table, .* like .500"),
        (item_frame(pl.Series([], dtype=pl.Int64), pl.Series([], dtype=pl.String)), "no item of the log"),
    ],
)
def test_an_item_table_of_something_else(items: pl.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message):
        item_table(load_dataset("synthetic"), items)


def test_a_table_of_items(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("brand,item,categories,title\nAcme,1,Bath|Care,Soap\n,2,,Comb\n")
    rows = read_items(tmp_path / "items.csv", "table").to_dicts()
    assert [Template().render(row) for row in rows] == ["Soap. Brand: Acme. Category: Bath, Care", "Comb"]


# With the real model.


def test_rows_equal_those_of_the_published_recipe(shared_data: Path) -> None:
    """The table of the data set was made by other code and stored in float16."""
    folder = shared_data / "ml-100k"
    items = item_table(load_dataset("ml-100k", folder, user_min=0, item_min=0)).gather_every(35)
    encoder = load_encoder(small_model(), device="cpu")
    made, alone = (
        embed_items(items, encoder, "{title}, {categories: }", batch_size=size, progress=False).table.embeddings
        for size in (16, 1)
    )
    published = load_text_table(folder / "text_minilm.npz")
    place = {item: row for row, item in enumerate(published.items)}
    stored = published.embeddings[[place[item] for item in items["item"]]].numpy()
    # Half a step of float16, and what float32 itself leaves open: other neighbours in a batch, other padding.
    band = np.spacing(np.abs(stored).astype(np.float16)).astype(np.float32) / 2 + 2 * float((made - alone).abs().max())
    assert len(items) > 40
    assert np.all(np.abs(made.numpy() - stored) <= band)


def test_the_model_says_what_goes_in_front_and_how_long_rows_are(tmp_path: Path) -> None:
    source = small_model()
    plain = load_encoder(source, device="cpu")
    made = embed_items(ITEMS, plain, progress=False)
    assert made.metadata["normalized"] == "true"
    assert plain.prompt == ""
    lengths = made.table.embeddings.norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))

    for name in ("moved", "prompted"):
        shutil.copytree(source, tmp_path / name)
    config = tmp_path / "prompted" / "config_sentence_transformers.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prompts": {"query": "q: ", "passage": "p: "}}))
    moved = load_encoder(tmp_path / "moved", device="cpu")
    prompted = load_encoder(tmp_path / "prompted", device="cpu")
    assert moved.identity == plain.identity
    assert prompted.version != plain.version
    assert prompted.prompt == "p: "
    assert load_encoder(tmp_path / "prompted", device="cpu", prompt="").prompt == ""
    expected = plain.model.encode(["p: Soap"])
    np.testing.assert_allclose(prompted.encode(["Soap"]), expected, atol=1e-6)  # the same text in both


def test_from_a_log_to_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    made = synthetic(n_users=20, n_items=14, length=10)
    made.log.with_columns(pl.format("sku-{}", "item").alias("item")).write_csv(tmp_path / "events.csv")
    names = made.items.select(pl.format("sku-{}", "item").alias("item"), "title").filter(pl.col("item") != "sku-3")
    names.write_csv(tmp_path / "names.csv")
    out = tmp_path / "out" / "text.safetensors"
    arguments = ["embed-items", "--dataset", "table", "--data", str(tmp_path / "events.csv"), "--model", model,
                 "--item-file", str(tmp_path / "names.csv"), "--cache", str(tmp_path / "cache"), "--device", "cpu",
                 "--template", "{title}", "--out", str(out)]  # fmt: skip
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "without text   1, their rows are zero" in first
    assert "13 distinct, 13 embedded now, 0 known" in first
    table = load_text_table(out)
    loaded = load_dataset("table", tmp_path / "events.csv", text=str(out), user_min=0, item_min=0)
    assert loaded.text is not None
    assert loaded.text.missing == 1
    assert torch.equal(loaded.text.table[1:], table.embeddings)
    assert not table.embeddings[table.items.index("sku-3")].any()
    metadata = load_tensors(out)[1]
    assert (metadata["template"], metadata["model"], metadata["normalized"]) == ("{title}", model, "true")
    assert metadata["model_version"].startswith("sha256:")
    before = out.read_bytes()
    assert main(arguments) == 0
    assert "0 embedded now, 13 known" in capsys.readouterr().out
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nobody/no-such-model", "no folder here, not in the Hugging Face cache, and the hub cannot be reached"),
        ("no-such-folder", "no such folder, and no name on the Hugging Face hub"),
        ("{folder}", "not a sentence-transformers model"),
    ],
)
def test_a_model_that_is_not_there(
    model: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    arguments = ["embed-items", "--dataset", "synthetic", "--out", str(tmp_path / "t.safetensors"), "--no-cache"]
    assert main([*arguments, "--model", model.format(folder=tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fastm2rec embed-items: error: ")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert main(["embed-items", "--dataset", "synthetic", "--out", str(tmp_path / "t.safetensors"), "--no-cache"]) == 1
    assert 'pip install "fastm2rec[text]"' in capsys.readouterr().err


def test_a_table_holds_its_own_ids(tmp_path: Path) -> None:
    made = embed_items(ITEMS, invented(), progress=False)
    save_text_table(tmp_path / "t.safetensors", made.table, made.metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]
    assert load_text_table(tmp_path / "t.safetensors").items == ["a", "b", "c", "d", "e"]
    with pytest.raises(DataError, match="t.npz: expected a file ending in .safetensors"):
        save_text_table(tmp_path / "t.npz", made.table)
