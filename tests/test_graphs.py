"""`GraphedEncoder`'s buckets, buffers and turns, on a CPU: what a CUDA graph does is played by operations on record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastm2rec import M2Rec, M2RecConfig, _graphs
from fastm2rec.folded import FoldedM2Rec

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("there is a GPU, which has graphs of its own", allow_module_level=True)

N_ITEMS, MAX_LEN = 30, 40


class Recording(TorchDispatchMode):
    """A graph: `replay` does its operations again, on the same tensors and into the same results."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self._calls:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():  # else a view, or in place
                    kept.copy_(new)


class Stream:
    """Of work that is done at once."""

    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def graph(recording: Recording, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        with recording:
            yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(_graphs, "MAX_ROWS", 4)


@pytest.fixture
def folded() -> FoldedM2Rec:
    config = M2RecConfig(n_items=N_ITEMS, max_len=MAX_LEN, d_model=16, d_state=4, gate="none", spectrum="valid")
    model = M2Rec(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return FoldedM2Rec(model.eval(), "triton")


def batch(rows: int, longest: int) -> tuple[Tensor, Tensor]:
    lengths = torch.randint(1, longest + 1, (rows,))
    lengths[-1] = longest
    item_ids = torch.randint(1, N_ITEMS + 1, (rows, longest))
    return item_ids.masked_fill(torch.arange(longest) >= lengths[:, None], 0), lengths


@torch.no_grad()
def test_answers_are_the_encoders(folded: FoldedM2Rec) -> None:
    """Of every bucket, and whatever the batch before it left in the buffers."""
    graphed = _graphs.GraphedEncoder(folded)
    for rows, longest in ((4, 16), (1, 3), (3, 9), (2, 16), (4, 1), (3, 30), (1, MAX_LEN), (4, 20), (9, 12)):
        item_ids, lengths = batch(rows, longest)
        query = graphed.encode(item_ids, lengths)
        torch.testing.assert_close(query, folded.encode(item_ids, lengths), rtol=1e-5, atol=1e-5)
    assert set(graphed._graphs) == {(4, 16), (1, 16), (2, 16), (4, 32), (1, MAX_LEN)}
    assert all(graph._graph.replays for graph in graphed._graphs.values())  # type: ignore[attr-defined]


@torch.no_grad()
def test_an_answer_outlives_the_next_call(folded: FoldedM2Rec) -> None:
    graphed = _graphs.GraphedEncoder(folded)
    first = graphed.encode(*batch(2, 8))
    kept = first.clone()
    graphed.encode(*batch(2, 8))
    assert torch.equal(first, kept)


@torch.no_grad()
def test_threads_take_turns(folded: FoldedM2Rec) -> None:
    graphed = _graphs.GraphedEncoder(folded)
    # One bucket: the interpreter, unlike a GPU, runs one kernel at a time.
    batches = [batch(3 + i % 2, 1 + i % 13) for i in range(24)]
    expected = [graphed.encode(*one) for one in batches]

    def encode(one: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            return graphed.encode(*one)

    with ThreadPoolExecutor(8) as pool:
        for query, wanted in zip(pool.map(encode, batches), expected, strict=True):
            assert torch.equal(query, wanted)


def test_a_graph_made_in_inference_mode_serves_outside_of_it(folded: FoldedM2Rec) -> None:
    graphed, one = _graphs.GraphedEncoder(folded), batch(2, 8)
    with torch.inference_mode():
        made = graphed.encode(*one).clone()
    with torch.no_grad():
        assert torch.equal(graphed.encode(*one), made)
