"""The exact k best against a full sort. Scores are small whole numbers, exact in float32 in any order of summation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastm2rec import _topk
from fastm2rec._topk import leading, top_k


def _brute_force(queries: Tensor, weight: Tensor, k: int, seen: list[set[int]]) -> tuple[list[list[float]], list]:
    """Sorted in Python, by falling score, then by rising id."""
    scores, ids = [], []
    for row, hidden in zip((queries.double() @ weight.double().t()).tolist(), seen, strict=True):
        left = sorted((-row[item], item) for item in range(1, len(row)) if item not in hidden)[:k]
        missing = k - len(left)
        scores.append([-score for score, _ in left] + [-float("inf")] * missing)
        ids.append([item for _, item in left] + [0] * missing)
    return scores, ids


def _pairs(seen: list[set[int]]) -> tuple[Tensor, Tensor]:
    """In no order, and each twice."""
    flat = torch.tensor([(row, item) for row, items in enumerate(seen) for item in items] * 2).view(-1, 2)
    rows, items = flat[torch.randperm(len(flat))].unbind(1)
    return rows, items


# Values in -1..1 make ties everywhere, in -50..50 few.
@pytest.mark.parametrize("spread", [1, 50])
@pytest.mark.parametrize("k", [1, 7, 40, 120])
@pytest.mark.parametrize("chunk", [None, 1, 5, 40, 119, 120, 121])
def test_against_a_full_sort(spread: int, k: int, chunk: int | None) -> None:
    n_items = 120
    weight = torch.randint(-spread, spread + 1, (n_items + 1, 3)).float()
    weight[0] = 1000.0  # padding would win
    queries = torch.randint(-spread, spread + 1, (4, 3)).float()
    seen = [set(range(3, n_items + 1)), set(), {1, n_items}, set(range(1, n_items + 1))]  # two left, and none
    for hidden in (None, seen):
        scores, ids = top_k(queries, weight, k, None if hidden is None else _pairs(hidden), chunk)
        expected = _brute_force(queries, weight, k, hidden or [set()] * 4)
        assert (scores.tolist(), ids.tolist()) == expected


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 300, 2048, 4100])
@pytest.mark.parametrize("levels", [2, 1000])
def test_blocks_change_nothing(columns: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_topk, "_MIN_BLOCKED", 1)
    scores = torch.randint(0, levels, (5, columns)).float()
    scores[1] = -torch.inf
    for k in {1, min(3, columns), min(20, columns), columns}:
        values, places = leading(scores, k)
        expected, order = scores.sort(dim=1, descending=True, stable=True)
        assert torch.equal(values, expected[:, :k])
        assert torch.equal(places.sort(1).values, order[:, :k].sort(1).values)  # of equal ones the lower columns


def test_a_large_catalogue_is_scored_in_blocks_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more scores at once than the limit, nor a score of every item for every row."""
    weight = torch.randint(-9, 10, (40_001, 4)).float()
    queries = torch.randint(-9, 10, (3, 4)).float()
    monkeypatch.setattr(_topk, "_MAX_SCORES", 60_000)
    sizes = []
    original = _topk.leading

    def watched(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        sizes.append(scores.numel())
        return original(scores, k)

    monkeypatch.setattr(_topk, "leading", watched)
    scores, ids = top_k(queries, weight, 10)
    assert max(sizes) <= 60_000
    assert (scores.tolist(), ids.tolist()) == _brute_force(queries, weight, 10, [set()] * 3)


def test_a_row_alone_and_in_any_batch() -> None:
    """To the last bit, although a matrix product sums in another order for another number of rows."""
    weight, queries = torch.randn(5001, 64), torch.randn(37, 64)
    scores, ids = top_k(queries, weight, 10)
    for start, stop in ((0, 1), (1, 3), (3, 8), (8, 37)):
        part_scores, part_ids = top_k(queries[start:stop], weight, 10)
        assert torch.equal(part_scores, scores[start:stop])
        assert torch.equal(part_ids, ids[start:stop])


def test_equal_vectors_tie_exactly() -> None:
    weight = torch.randn(1, 64).expand(1001, 64).clone()
    _, ids = top_k(torch.randn(3, 64), weight, 50, chunk=333)
    assert ids.tolist() == [list(range(1, 51))] * 3


def test_nan_is_an_error() -> None:
    weight = torch.randn(50, 4)
    weight[30, 1] = torch.nan
    with pytest.raises(ValueError, match="the model's scores are NaN"):
        top_k(torch.randn(2, 4), weight, 5)
