"""The exact k best against a full sort, by the CPU engine's kernels and by torch, and one against the other.

Most scores are small whole numbers, exact in float32 in any order of summation.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastm2rec import _topk, cpu
from fastm2rec._topk import leading, rescored, top_k

needs_numba = pytest.mark.skipif(cpu.missing() is not None, reason="numba is not installed")


@pytest.fixture(params=["numba", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the answer."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "_HAS_NUMBA", False)
    elif cpu.missing() is not None:
        pytest.skip("numba is not installed")
    return request.param


both_ways = pytest.mark.usefixtures("way")


@pytest.fixture
def finely_sliced(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    """Every row may go to another thread."""
    from fastm2rec.cpu import top_k as launch

    monkeypatch.setattr(launch, "LOOKED_AT", 1)
    threads(3)


def _same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """To the last bit."""
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _by_torch(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[Tensor, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_HAS_NUMBA", False)
        return top_k(*arguments)


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


@both_ways
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


class _Products(TorchDispatchMode):
    """The sizes of the matrix products that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.sizes.append(result.numel())
        return result


@both_ways
def test_a_large_catalogue_is_scored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more scores at once than the limit, nor a score of every item for every row."""
    weight = torch.randint(-9, 10, (40_001, 4)).float()
    queries = torch.randint(-9, 10, (3, 4)).float()
    monkeypatch.setattr(_topk, "_MAX_SCORES", 60_000)
    with _Products() as products:
        scores, ids = top_k(queries, weight, 10)
    assert 1 < len(products.sizes) <= 4
    assert max(products.sizes) <= 60_000
    assert (scores.tolist(), ids.tolist()) == _brute_force(queries, weight, 10, [set()] * 3)


@both_ways
def test_a_row_alone_and_in_any_batch() -> None:
    """To the last bit, although a matrix product sums in another order for another number of rows."""
    weight, queries = torch.randn(5001, 64), torch.randn(37, 64)
    scores, ids = top_k(queries, weight, 10)
    for start, stop in ((0, 1), (1, 3), (3, 8), (8, 37)):
        part_scores, part_ids = top_k(queries[start:stop], weight, 10)
        assert torch.equal(part_scores, scores[start:stop])
        assert torch.equal(part_ids, ids[start:stop])


@both_ways
def test_equal_vectors_tie_exactly() -> None:
    weight = torch.randn(1, 64).expand(1001, 64).clone()
    _, ids = top_k(torch.randn(3, 64), weight, 50, chunk=333)
    assert ids.tolist() == [list(range(1, 51))] * 3


@both_ways
@pytest.mark.parametrize("item", [1, 63, 5000, 9000])
def test_nan_is_an_error(item: int) -> None:
    """Wherever it is, unless the row has seen that item."""
    weight, queries = torch.randn(9001, 4), torch.randn(2, 4)
    weight[0] = torch.nan  # padding
    expected = top_k(queries, weight, 5)
    weight[item, 1] = torch.nan
    for chunk in (None, 1000):
        with pytest.raises(ValueError, match="the model's scores are NaN"):
            top_k(queries, weight, 5, None, chunk)
    scores, ids = top_k(queries, weight, 5, (torch.arange(2), torch.tensor([item, item])))
    if item not in expected[1]:
        assert _same((scores, ids), expected)
    weight[item, 1] = 0
    queries[1, 2] = torch.nan
    with pytest.raises(ValueError, match="the model's scores are NaN"):
        top_k(queries, weight, 5)


@both_ways
def test_infinite_scores() -> None:
    """Infinity is a score; so is what is too low for float32, where nothing is hidden."""
    weight, queries = torch.ones(301, 2), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    weight[7] = weight[200] = torch.inf
    scores, ids = top_k(queries, weight, 3)
    assert scores.tolist() == [[torch.inf, torch.inf, 2], [-2, -2, -2]]
    assert ids.tolist() == [[7, 200, 1], [1, 2, 3]]
    scores, ids = top_k(queries * 1e30, torch.full((301, 2), 1e30), 3)
    assert scores.tolist() == [[torch.inf] * 3, [-torch.inf] * 3]
    assert ids.tolist() == [[1, 2, 3]] * 2


@both_ways
def test_no_rows() -> None:
    for seen in (None, (torch.empty(0, dtype=torch.int64),) * 2):
        scores, ids = top_k(torch.randn(0, 8), torch.randn(101, 8), 5, seen)
        assert (scores.shape, ids.shape) == ((0, 5), (0, 5))
        assert (scores.dtype, ids.dtype) == (torch.float32, torch.int64)


@both_ways
def test_any_strides() -> None:
    weight, queries = torch.randint(-5, 6, (301, 40)).float(), torch.randint(-5, 6, (3, 40)).float()
    expected = top_k(queries, weight, 20)
    wide = torch.zeros(301, 80)
    wide[:, ::2] = weight
    for table in (wide[:, ::2], weight.t().contiguous().t(), torch.nn.Parameter(weight)):
        assert _same(top_k(queries.t().contiguous().t(), table, 20), expected)


@both_ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    weight, queries = torch.randint(-3, 4, (301, 8)), torch.randint(-3, 4, (3, 8))
    scores, ids = top_k(queries.to(dtype), weight.to(dtype), 20)
    assert scores.dtype == dtype
    assert (scores.tolist(), ids.tolist()) == _brute_force(queries.float(), weight.float(), 20, [set()] * 3)


@both_ways
@pytest.mark.parametrize("k", [1, 20, 3000, 5000])
def test_scores_in_order(k: int) -> None:
    """Rising, every item displaces another one; falling, or all the same, none does."""
    rising = torch.arange(5001.0).unsqueeze(1)
    scores, ids = top_k(torch.tensor([[1.0], [-1.0], [0.0]]), rising, k)
    assert ids[0].tolist() == list(range(5000, 5000 - k, -1))
    assert ids[1].tolist() == ids[2].tolist() == list(range(1, k + 1))
    assert torch.equal(scores, torch.stack([ids[0].float(), -ids[1].float(), torch.zeros(k)]))


@needs_numba
def test_kernels_against_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; in float64 with whole numbers, whose sums are exact in any order."""
    draw = random.Random(0)
    for _ in range(150):
        rows, n_items, dim = draw.randint(0, 6), draw.choice([1, 3, 64, 129, 700, 4999]), draw.choice([1, 7, 64, 65])
        k = draw.choice([1, 10, n_items // 2, n_items - 1, n_items])
        k = min(max(k, 1), n_items)
        dtype = draw.choice([torch.float32, torch.float64])
        weight, queries = torch.randn(n_items + 1, dim, dtype=dtype), torch.randn(rows, dim, dtype=dtype)
        if dtype == torch.float64 or draw.random() < 0.5:
            spread = draw.choice([1, 100])
            weight, queries = (weight * spread).round(), (queries * spread).round()
        pairs = draw.choice([0, 1, 50, 2 * n_items]) if rows else 0
        seen = torch.randint(0, max(rows, 1), (pairs,)), torch.randint(1, n_items + 1, (pairs,))
        if rows and draw.random() < 0.2:  # one row has seen everything
            seen = torch.cat([seen[0], torch.zeros(n_items).long()]), torch.cat([seen[1], torch.randperm(n_items) + 1])
        arguments = (queries, weight, k, draw.choice([None, seen]), draw.choice([None, max(1, n_items // 7), 200]))
        assert _same(top_k(*arguments), _by_torch(monkeypatch, *arguments)), arguments


@needs_numba
def test_candidates_against_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order and with gaps, as an index finds them."""
    weight, queries = torch.randn(501, 20), torch.randn(6, 20)
    weight[0] = torch.nan
    ids = torch.stack([torch.randperm(500)[:30] + 1 for _ in range(6)])
    ids[0, 5:] = 0
    ids[1] = 0
    got = rescored(queries, weight, ids, 10)
    assert got[1][0, 5:].tolist() == [0] * 5
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_HAS_NUMBA", False)
        assert _same(got, rescored(queries, weight, ids, 10))
    weight[ids[2, 7]] = torch.nan
    with pytest.raises(ValueError, match="the model's scores are NaN"):
        rescored(queries, weight, ids, 10)


@needs_numba
def test_candidates_that_cannot_be() -> None:
    queries, weight, ids = torch.randn(2, 4), torch.randn(21, 4), torch.ones(2, 6, dtype=torch.int64)
    for wrong in (-1, 21):
        ids[1, 3] = wrong
        with pytest.raises(IndexError, match=rf"ids: expected 0..20, got {min(wrong, 1)} to {max(wrong, 1)}"):
            rescored(queries, weight, ids, 5)
    for other in (queries[:1], queries[:, :3]):
        with pytest.raises(ValueError, match="queries: expected shape"):
            rescored(other, weight, ids.clamp(0, 20), 5)


@both_ways
@pytest.mark.parametrize("k", [0, -4])
def test_at_least_one(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: expected at least 1, got {k}"):
        top_k(torch.randn(2, 4), torch.randn(21, 4), k)


@needs_numba
@pytest.mark.parametrize("pair", [(0, 0), (0, 21), (2, 1), (-1, 1)])
def test_pairs_that_cannot_be(pair: tuple[int, int]) -> None:
    queries, weight = torch.randn(2, 4), torch.randn(21, 4)
    rows, items = torch.tensor([(0, 1), pair]).unbind(1)
    for chunk in (None, 6):
        with pytest.raises(
            IndexError, match=rf"seen: expected rows 0\.\.1 and items 1\.\.20, got {pair[0]} and {pair[1]}"
        ):
            top_k(queries, weight, 5, (rows, items), chunk)
    with pytest.raises(ValueError, match="seen: expected as many rows as items"):
        top_k(queries, weight, 5, (rows, items[:1]))


def _case(rows: int) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor]]:
    seen = torch.randint(0, rows, (200,)), torch.randint(1, 3001, (200,))
    arguments = torch.randn(rows, 32), torch.randn(3001, 32), 10, seen
    return arguments, top_k(*arguments)


@needs_numba
@pytest.mark.usefixtures("finely_sliced")
def test_sixteen_threads_at_once() -> None:
    cases = [_case(1 + n) for n in range(16)]
    barrier = threading.Barrier(16)
    wrong: list[Any] = []

    def hammer(arguments: tuple[Any, ...], expected: tuple[Tensor, Tensor]) -> None:
        torch.set_num_threads(3)
        barrier.wait()
        try:
            for _ in range(10):
                got = top_k(*arguments)
                if not _same(got, expected):
                    wrong.append("a result changed")
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=hammer, args=case) for case in cases]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    assert not wrong


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("finely_sliced")
def test_a_forked_child_answers_the_same() -> None:
    arguments, expected = _case(9)
    queries, weight, k, _ = arguments
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for threads that it does not have is killed
        same = False
        try:
            # The kernels alone: torch's own product may wait for its threads.
            same = _same(rescored(queries, weight, expected[1], k), expected)
        finally:
            os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert _same(top_k(*arguments), expected)


@needs_numba
def test_a_compiled_graph_takes_torch() -> None:
    queries, weight = torch.randn(2, 8), torch.randn(51, 8)
    expected = top_k(queries, weight, 5)
    scores, ids = torch.compile(top_k, backend="eager")(queries, weight, 5)
    assert _same((scores, ids), expected)
