"""The FAISS index: what an exact one answers, what is left out, and that a short answer is made exact."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastm2rec import M2Rec, M2RecConfig, Recommender, StorageError
from fastm2rec._topk import top_k
from fastm2rec.ann import ItemIndex

faiss = pytest.importorskip("faiss")

N_ITEMS, DIM = 1200, 16


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(N_ITEMS + 1, DIM)


@pytest.fixture
def queries() -> torch.Tensor:
    return torch.randn(30, DIM)


def test_a_flat_index_is_exact(weight: torch.Tensor, queries: torch.Tensor) -> None:
    index = ItemIndex.build(weight, "Flat")
    rows = torch.arange(30).repeat_interleave(25)
    _, ids = top_k(queries, weight, 25)
    seen = rows, ids.flatten()  # the best ones, so that fetching k alone would find none of the answer
    for hidden in (None, seen):
        found, expected = index.search(queries, 10, hidden, weight), top_k(queries, weight, 10, hidden)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    assert index.recall(queries, 10, weight) == 1.0


@pytest.mark.parametrize("factory", ["HNSW32", "IVF16,Flat", "IVF16,PQ4x4"])
def test_an_approximate_index(factory: str, weight: torch.Tensor, queries: torch.Tensor, tmp_path: Path) -> None:
    index = ItemIndex.build(weight, factory)
    index.save(tmp_path / "items.faiss")
    again = ItemIndex.load(tmp_path / "items.faiss")
    assert (again.n_items, again.dim) == (N_ITEMS, DIM)
    seen = torch.randint(0, 30, (900,)), torch.randint(1, N_ITEMS + 1, (900,))
    values, ids = again.search(queries, 10, seen, weight)
    assert torch.equal(index.search(queries, 10, seen, weight)[1], ids)
    hidden = set(zip(*(tensor.tolist() for tensor in seen), strict=True))
    for row in range(30):
        assert len(set(ids[row].tolist())) == 10
        assert not hidden & {(row, item) for item in ids[row].tolist()}
    # Scores are those of the items, also where the index holds them compressed.
    exact = (weight[ids].double() @ queries.double().unsqueeze(2)).squeeze(2).float()
    assert torch.equal(values, exact)
    assert (values[:, :-1] >= values[:, 1:]).all()
    _, best = top_k(queries, weight, 10)
    found = index.search(queries, 10, None, weight)[1]
    hits = sum(len(set(row) & set(answer)) for row, answer in zip(best.tolist(), found.tolist(), strict=True))
    assert index.recall(queries, 10, weight) == pytest.approx(hits / 300)


def test_a_short_answer_is_made_exact(weight: torch.Tensor, queries: torch.Tensor) -> None:
    """A row has seen all but three items, which an index that looks at one list of sixteen cannot all find."""
    index = ItemIndex.build(weight, "IVF16,Flat")
    faiss.downcast_index(index._index.index).nprobe = 1
    items = torch.arange(4, N_ITEMS + 1)
    seen = torch.full_like(items, 7), items
    values, ids = index.search(queries, 5, seen, weight)
    expected, best = top_k(queries, weight, 5, seen)
    assert torch.equal(ids[7], best[7])
    assert torch.equal(values[7], expected[7])
    assert sorted(ids[7].tolist()) == [0, 0, 1, 2, 3]


def test_through_the_recommender() -> None:
    model = M2Rec(M2RecConfig(n_items=50, max_len=8, d_model=16, d_state=4, gate="none"))
    exact = Recommender(model)
    indexed = Recommender(model, index=ItemIndex.build(exact.item_weight, "Flat"))
    histories = [[1, 2, 3], list(range(1, 49)), [7]]
    assert indexed.recommend(histories, 5) == exact.recommend(histories, 5)
    with pytest.raises(ValueError, match="index: expected 50 items, as in the model, got 20"):
        Recommender(model, index=ItemIndex.build(exact.item_weight[:21], "Flat"))


def test_what_is_refused(
    weight: torch.Tensor, queries: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="factory: FAISS cannot build 'Tree' of 1,200 items: could not parse"):
        ItemIndex.build(weight, "Tree")
    with pytest.raises(ValueError, match=r"queries: expected shape \[B, 16\], as in the index, got \[30, 15\]"):
        ItemIndex.build(weight, "Flat").search(queries[:, :15], 5, None, weight)
    with pytest.raises(StorageError, match="no such file"):
        ItemIndex.load(tmp_path / "none")
    ItemIndex.build(weight, "Flat").save(tmp_path / "index")
    (tmp_path / "index").write_bytes((tmp_path / "index").read_bytes()[:-100])
    with pytest.raises(StorageError, match="truncated or not a FAISS index"):
        ItemIndex.load(tmp_path / "index")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'fastm2rec\[ann\]'") as raised:
        ItemIndex.build(weight)
    assert raised.value.name == "faiss"
