"""The rank of the next item against a sort of the whole catalogue; HR, NDCG and MRR against two other libraries."""

from __future__ import annotations

import ir_measures
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, Success, nDCG
from torch import Tensor
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

from fastm2rec import metrics
from fastm2rec.metrics import RankingMetrics, target_ranks


def _sorted_ranks(query: Tensor, weight: Tensor, targets: Tensor, excluded: list[list[int]] | None = None) -> Tensor:
    """Score, sort stably, look the target up."""
    ranks = []
    for row, target in enumerate(targets.tolist()):
        scores = (query[row].double() @ weight.double().t()).float()
        out = set() if excluded is None else set(excluded[row]) - {target}
        items = [item for item in range(1, len(weight)) if item not in out]
        items.sort(key=lambda item: -float(scores[item]))  # Python's sort keeps equal scores in the order of their ids
        ranks.append(items.index(target) + 1)
    return torch.tensor(ranks)


def _ragged(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    return torch.tensor([item for row in rows for item in row], dtype=torch.int64), lengths.cumsum(0)


def _small_integers(*shape: int, generator: torch.Generator) -> Tensor:
    """Entries whose dot products are exact, and often equal."""
    return torch.randint(-1, 2, shape, generator=generator).float()


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    n_items=st.integers(1, 12),
    chunk=st.one_of(st.none(), st.integers(1, 13)),
    exclude=st.booleans(),
)
def test_ranks_are_those_of_a_stable_sort(seed: int, rows: int, n_items: int, chunk: int | None, exclude: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = _small_integers(rows, 2, generator=generator)
    weight = _small_integers(n_items + 1, 2, generator=generator)
    weight[0] = 100.0  # padding would win if it were ranked
    targets = torch.randint(1, n_items + 1, (rows,), generator=generator)
    # With repetitions, and with the target itself.
    excluded = [torch.randint(1, n_items + 1, (row,), generator=generator).tolist() for row in range(rows)]
    ranks = target_ranks(query, weight, targets, _ragged(excluded) if exclude else None, chunk)
    assert torch.equal(ranks, _sorted_ranks(query, weight, targets, excluded if exclude else None))


def test_ranks_of_ordinary_scores_do_not_depend_on_chunks_or_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    query, weight = torch.randn(20, 16), torch.randn(301, 16)
    weight[200] = weight[7]  # one tie among numbers that are rounded
    targets = torch.randint(1, 301, (20,))
    targets[:2] = torch.tensor([7, 200])
    excluded = [torch.randint(1, 301, (n,)).tolist() for n in range(20)]
    ranks = target_ranks(query, weight, targets, _ragged(excluded))
    assert torch.equal(ranks, _sorted_ranks(query, weight, targets, excluded))
    for chunk in (1, 7, 300, 1000):
        assert torch.equal(target_ranks(query, weight, targets, _ragged(excluded), chunk), ranks)
    monkeypatch.setattr(metrics, "_MAX_SCORES", 100)
    assert torch.equal(target_ranks(query, weight, targets, _ragged(excluded)), ranks)
    for row in range(20):
        alone = target_ranks(query[row : row + 1], weight, targets[row : row + 1], _ragged(excluded[row : row + 1]))
        assert torch.equal(alone, ranks[row : row + 1])


def test_low_precision_is_ranked_as_it_is() -> None:
    query, weight = torch.randn(5, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    targets = torch.randint(1, 40, (5,))
    assert torch.equal(target_ranks(query, weight, targets), _sorted_ranks(query.float(), weight.float(), targets))


def test_no_rows() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert target_ranks(torch.empty(0, 3), torch.randn(5, 3), empty).shape == (0,)
    assert target_ranks(torch.empty(0, 3), torch.randn(5, 3), empty, (empty, torch.zeros(1, dtype=torch.int64))).shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["query", "weight"])
def test_scores_that_are_not_finite(place: str, bad: float) -> None:
    query, weight = torch.ones(2, 3), torch.ones(9, 3)
    (query if place == "query" else weight)[1, 2] = bad
    with pytest.raises(ValueError, match="the scores hold NaN or infinity: the model's weights, or its text table"):
        target_ranks(query, weight, torch.tensor([4, 5]), chunk=2)


def test_wrong_arguments_are_named() -> None:
    query, weight, targets = torch.ones(2, 3), torch.ones(9, 3), torch.tensor([1, 8])
    with pytest.raises(ValueError, match=r"query, weight: expected shapes .* got \[2, 3\] and \[9, 4\]"):
        target_ranks(query, torch.ones(9, 4), targets)
    with pytest.raises(ValueError, match=r"targets: expected shape \[2\], got \[3\]"):
        target_ranks(query, weight, torch.tensor([1, 2, 3]))
    for wrong, got in (([0, 1], "0 to 1"), ([1, 9], "1 to 9")):
        with pytest.raises(ValueError, match=f"targets: expected items from 1 to 8, got {got}"):
            target_ranks(query, weight, torch.tensor(wrong))
    with pytest.raises(ValueError, match="chunk: expected at least 1, got 0"):
        target_ranks(query, weight, targets, chunk=0)
    for offsets in ([0, 1], [0, 1, 1]):
        with pytest.raises(ValueError, match=r"exclude: expected offsets of shape \[3\] that end at 2"):
            target_ranks(query, weight, targets, (torch.tensor([1, 2]), torch.tensor(offsets)))


@pytest.fixture(scope="module")
def ranked() -> tuple[Tensor, Tensor]:
    """Scores [users, n_items] without ties, and the place of each user's target among them."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.stack([torch.randperm(60, generator=generator) for _ in range(200)]).double()
    return scores, torch.randint(0, 60, (200,), generator=generator)


# The libraries average 200 float32 or float64 values of at most 1 each; torchmetrics' are float32, so its mean is off
# by 200 roundings of 2^-24 at most, ir_measures' by as many of 2^-53.
TORCHMETRICS_BOUND = 200 * 2.0**-24
IR_MEASURES_BOUND = 200 * 2.0**-53


@pytest.mark.parametrize("k", [1, 5, 10, 59])
def test_equal_to_torchmetrics_and_ir_measures(ranked: tuple[Tensor, Tensor], k: int) -> None:
    scores, places = ranked
    users, n_items = scores.shape
    ours = RankingMetrics((k, 60))
    weight = torch.cat([torch.zeros(1, n_items), torch.eye(n_items)])
    for part in torch.arange(users).split(64):
        ours.update(target_ranks(scores[part], weight, places[part] + 1))
    values = ours.compute()
    assert ours.n == users

    relevant = torch.zeros(users, n_items, dtype=torch.bool).scatter(1, places[:, None], True)
    indexes = torch.arange(users)[:, None].expand(users, n_items)
    theirs = (RetrievalHitRate(top_k=k), RetrievalNormalizedDCG(top_k=k), RetrievalMRR(top_k=k))
    for name, metric in zip(("HR", "NDCG", "MRR"), theirs, strict=True):
        value = float(metric(scores.float().flatten(), relevant.flatten(), indexes.flatten()))
        assert values[f"{name}@{k}"] == pytest.approx(value, abs=TORCHMETRICS_BOUND)

    qrels = {str(user): {str(place): 1} for user, place in enumerate(places.tolist())}
    run = {str(user): {str(item): value for item, value in enumerate(row)} for user, row in enumerate(scores.tolist())}
    measured = ir_measures.calc_aggregate([Success @ k, nDCG @ k, RR @ k], qrels, run)
    for name, measure in (("HR", Success @ k), ("NDCG", nDCG @ k), ("MRR", RR @ k)):
        assert values[f"{name}@{k}"] == pytest.approx(measured[measure], abs=IR_MEASURES_BOUND)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=50), st.integers(1, 50), st.randoms())
def test_the_same_bits_whatever_the_order_and_the_batches(ranks: list[int], size: int, random) -> None:
    whole, parts = RankingMetrics(), RankingMetrics()
    whole.update(torch.tensor(ranks))
    random.shuffle(ranks)
    for part in torch.tensor(ranks).split(size):
        parts.update(part)
    assert whole.compute() == parts.compute()
    assert whole.n == parts.n == len(ranks)


def test_a_rank_at_the_cut_off_counts_and_one_behind_it_does_not() -> None:
    metrics = RankingMetrics((2, 3))
    metrics.update(torch.tensor([[3], [4]]))
    assert metrics.compute() == {
        "HR@2": 0, "NDCG@2": 0, "MRR@2": 0, "HR@3": 0.5, "NDCG@3": 0.25, "MRR@3": pytest.approx(1 / 6),
    }  # fmt: skip


def test_wrong_ranks_and_cutoffs_are_refused() -> None:
    for cutoffs in ((), (10, 0)):
        with pytest.raises(ValueError, match="cutoffs: expected integers of at least 1, got"):
            RankingMetrics(cutoffs)
    metrics = RankingMetrics()
    with pytest.raises(ValueError, match="no ranks were added: there is nothing to evaluate"):
        metrics.compute()
    with pytest.raises(ValueError, match="ranks: expected at least 1, got 0"):
        metrics.update(torch.tensor([1, 0]))
    assert metrics.n == 0
