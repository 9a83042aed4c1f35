"""The micro-batcher: every request gets its own answer, in batches no larger than allowed, whatever else happens."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from fastm2rec.serving.batching import Batcher, ClosingError, ComputeError, QueueFullError

FOREVER = 3600.0  # a window that no test outlives: whoever waits for it hangs, and `run` ends the test


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


class Model:
    """Squares numbers and remembers its batches. While `gate` is closed a batch stays where it is."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, key: str, items: list[int]) -> list[tuple[str, int]]:
        self.batches.append((key, items))
        assert self.gate.wait(60)
        if any(item < 0 for item in items):
            raise ArithmeticError("no negative numbers")
        return [(key, item * item) for item in items]


@pytest.fixture
def model() -> Iterator[Model]:
    model = Model()
    yield model
    model.gate.set()  # a failed test must not leave a thread behind


def batcher(model: Model, max_batch: int = 4, window: float = FOREVER, capacity: int = 100) -> Batcher:
    return Batcher(model, max_batch=max_batch, window=window, capacity=capacity)


async def occupy(own: Batcher, model: Model) -> asyncio.Task[Any]:
    """Close the gate and put a batch of one item, 0, behind it."""
    model.gate.clear()
    task = asyncio.ensure_future(own.submit("a", [0]))
    while not model.batches:
        await asyncio.sleep(0)
    return task


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(8))
def test_random_interleavings(seed: int) -> None:
    chance = random.Random(seed)
    seen: list[tuple[str, list[int]]] = []
    overlaps = []
    busy = threading.Lock()

    def compute(key: str, items: list[int]) -> list[tuple[str, int]]:
        overlaps.append(not busy.acquire(blocking=False))
        seen.append((key, items))
        time.sleep(chance.random() * 0.002)
        if any(item % 97 == 0 for item in items):
            busy.release()
            raise ArithmeticError
        busy.release()
        return [(key, item * item) for item in items]

    async def client(own: Batcher, number: int) -> str:
        key = chance.choice("abc")
        items = [number * 100 + place for place in range(chance.randint(0, 9))]
        await asyncio.sleep(chance.random() * 0.02)
        asked = asyncio.ensure_future(own.submit(key, items))
        if chance.random() < 0.2:
            await asyncio.sleep(chance.random() * 0.004)
            asked.cancel()
        try:
            answers = await asked
        except asyncio.CancelledError:
            return "cancelled"
        except ComputeError:
            batches = [batch for seen_key, batch in seen if seen_key == key and set(items) & set(batch)]
            assert any(item % 97 == 0 for batch in batches for item in batch)
            return "failed"
        assert answers == [(key, item * item) for item in items]
        return "answered"

    async def work() -> None:
        own: Batcher = Batcher(compute, max_batch=5, window=0.001, capacity=10_000)
        ends = await asyncio.gather(*(client(own, number) for number in range(150)))
        await own.close()
        assert own.depth == 0
        assert {"answered", "cancelled", "failed"} == set(ends)

    run(work())
    assert max(len(items) for _, items in seen) == 5
    assert not any(overlaps)
    everything = [item for _, items in seen for item in items]
    assert len(everything) == len(set(everything)), "no item is computed twice"


def test_a_lone_request_does_not_wait_for_the_window(model: Model) -> None:
    async def work() -> None:
        own = batcher(model)
        for item in (2, 3):
            assert await own.submit("a", [item]) == [("a", item * item)]

    run(work())
    assert model.batches == [("a", [2]), ("a", [3])]


def test_waiting_requests_share_a_batch_when_it_is_full(model: Model) -> None:
    async def work() -> None:
        own = batcher(model)
        first = await occupy(own, model)
        others = [asyncio.ensure_future(own.submit("a", [item])) for item in (1, 2)]
        await settle()
        model.gate.set()
        await first
        await settle()
        assert len(model.batches) == 1, "two wait for the window"
        await own.submit("a", [3, 4])
        assert [await one for one in others] == [[("a", 1)], [("a", 4)]]

    run(work())
    assert model.batches == [("a", [0]), ("a", [1, 2, 3, 4])]


def test_the_window_ends(model: Model) -> None:
    async def work() -> None:
        own = batcher(model, window=0.02)
        first = await occupy(own, model)
        others = [asyncio.ensure_future(own.submit("a", [item])) for item in (1, 2)]
        await settle()
        model.gate.set()
        await asyncio.gather(first, *others)

    run(work())
    assert model.batches == [("a", [0]), ("a", [1, 2])]


def test_other_keys_have_batches_of_their_own_oldest_first(model: Model) -> None:
    async def work() -> None:
        own = batcher(model, window=0.0)
        first = await occupy(own, model)
        others = [asyncio.ensure_future(own.submit(*one)) for one in (("b", [1]), ("a", [2]), ("b", [3]), ("c", [4]))]
        await settle()
        model.gate.set()
        await asyncio.gather(first, *others)

    run(work())
    assert model.batches == [("a", [0]), ("b", [1, 3]), ("a", [2]), ("c", [4])]


def test_a_long_request_is_spread_over_batches_and_answered_in_order(model: Model) -> None:
    async def work() -> None:
        assert await batcher(model).submit("a", range(10)) == [("a", item * item) for item in range(10)]

    run(work())
    assert [items for _, items in model.batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_failure_reaches_the_requests_of_its_batch_and_nobody_else(model: Model) -> None:
    async def work() -> None:
        own = batcher(model, max_batch=2, window=0.0)
        first = await occupy(own, model)
        pairs = [[1], [-1], [3], [4], [5, -1, 7], [8]]
        others = [asyncio.ensure_future(own.submit("a", items)) for items in pairs]
        await settle()
        model.gate.set()
        ends = await asyncio.gather(first, *others, return_exceptions=True)
        # [1] shared the batch of [-1]. The rest of [5, -1, 7] is never computed.
        assert [isinstance(end, ComputeError) for end in ends] == [False, True, True, False, False, True, False]
        assert isinstance(ends[1], ComputeError)
        assert str(ends[1]) == "ArithmeticError: no negative numbers"
        assert isinstance(ends[1].__cause__, ArithmeticError)
        assert ends[-1] == [("a", 64)]
        assert await own.submit("a", [9]) == [("a", 81)]
        assert own.depth == 0

    run(work())
    assert 7 not in [item for _, items in model.batches for item in items]


def test_a_wrong_number_of_answers_is_a_failure() -> None:
    async def work() -> None:
        own: Batcher = Batcher(lambda key, items: items[1:], max_batch=4, window=0.0, capacity=9)
        with pytest.raises(ComputeError, match="compute: expected 2 answers, got 1"):
            await own.submit("a", [1, 2])

    run(work())


@pytest.mark.parametrize("late", [False, True], ids=["while it waits", "in the same turn as the next batch"])
def test_cancelled_requests_are_dropped(model: Model, late: bool) -> None:
    async def work() -> None:
        own = batcher(model, window=0.0, capacity=6)
        first = await occupy(own, model)
        doomed = asyncio.ensure_future(own.submit("a", [1, 2, 3]))
        kept = asyncio.ensure_future(own.submit("a", [4]))
        await settle()
        assert own.depth == 4
        if late:
            pump = own._pump

            def cancel_and_pump() -> None:
                doomed.cancel()
                pump()

            own._pump = cancel_and_pump  # type: ignore[method-assign]
        else:
            doomed.cancel()
            await settle()
            assert own.depth == 1, "their places are free at once"
        model.gate.set()
        assert await kept == [("a", 16)]
        await first
        assert doomed.cancelled()
        assert own.depth == 0

    run(work())
    assert model.batches == [("a", [0]), ("a", [4])]


def test_cancelled_within_a_batch_the_others_are_answered(model: Model) -> None:
    async def work() -> None:
        own = batcher(model)
        first = await occupy(own, model)
        first.cancel()
        other = asyncio.ensure_future(own.submit("a", [5]))
        await settle()
        model.gate.set()
        assert await other == [("a", 25)]

    run(work())


def test_a_full_queue_takes_all_or_nothing(model: Model) -> None:
    async def work() -> None:
        own = batcher(model, window=0.0, capacity=3)
        first = await occupy(own, model)
        waiting = asyncio.ensure_future(own.submit("a", [1, 2]))
        await settle()
        with pytest.raises(QueueFullError, match="2 of 3 places in the queue are taken"):
            await own.submit("b", [3, 4])
        assert own.depth == 2
        third = asyncio.ensure_future(own.submit("b", [3]))
        await settle()
        model.gate.set()
        await asyncio.gather(first, waiting, third)
        assert await own.submit("b", [3, 4]) == [("b", 9), ("b", 16)]

    run(work())


def test_closing_answers_what_waits_and_takes_nothing_new(model: Model) -> None:
    before = set(threading.enumerate())
    own = batcher(model)  # whose window would never end

    async def work() -> None:
        first = await occupy(own, model)
        waiting = [asyncio.ensure_future(own.submit(key, [item])) for key, item in (("a", 1), ("b", 2), ("a", 3))]
        await settle()
        closing = asyncio.ensure_future(own.close())
        await settle()
        with pytest.raises(ClosingError):
            await own.submit("a", [4])
        assert not closing.done()
        model.gate.set()
        await closing
        assert [await one for one in (first, *waiting)] == [[("a", 0)], [("a", 1)], [("b", 4)], [("a", 9)]]
        with pytest.raises(ClosingError):
            await own.submit("a", [4])

    run(work())
    assert set(threading.enumerate()) <= before


def test_nothing_is_asked_for(model: Model) -> None:
    async def work() -> None:
        assert await batcher(model).submit("a", []) == []

    run(work())
    assert model.batches == []
