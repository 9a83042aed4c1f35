"""`encode_last` of the numba engine against the specification, on folded weights."""

from __future__ import annotations

import dataclasses
import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from tests._bounds import assert_as_good
from tests.test_folded import VARIANTS, batch, build, identify

pytest.importorskip("numba", reason="numba is not installed")

from fastm2rec import M2Rec, M2RecConfig, ops
from fastm2rec.cpu import encode_last as engine
from fastm2rec.cpu import last_scan
from fastm2rec.cpu import threads as thread_pool
from fastm2rec.folded import Folded, FoldedM2Rec, fold

LENGTHS = [24, 1, 7, 23, 2, 22, 24, 9, 16, 17]


def _run(folded: Folded, item_ids: Tensor, lengths: Tensor, impl: str = "cpu") -> Tensor:
    with torch.no_grad():
        return ops.encode_last(item_ids, lengths, folded, impl=impl)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("fields", VARIANTS, ids=identify)
def test_every_kind_of_model(fields: dict[str, Any]) -> None:
    folded = fold(build(**fields))
    item_ids, lengths = batch([min(n, folded.max_len) for n in LENGTHS], folded.max_len)
    exact = _run(folded, item_ids, lengths, "reference")
    # The same sums in another order; what the models here make of a rounding stays below a thousand of them.
    assert (_run(folded, item_ids, lengths) - exact).abs().max() <= 1e-13 * exact.abs().max()
    single = folded.to(dtype=torch.float32)
    # The folded offset of the convolution's bias is one rounding more than the specification has.
    assert_as_good(
        _run(single, item_ids, lengths), _run(single, item_ids, lengths, "reference"), exact, slack=4.0
    )  # fmt: skip


@pytest.mark.parametrize("seqlen", [50, 63, 200, 201])
def test_long_rows_and_published_sizes(seqlen: int) -> None:
    folded = fold(build(max_len=seqlen, d_model=64, d_state=32, theta=0.1))
    item_ids, lengths = batch([seqlen, 1, seqlen // 2, seqlen - 1], seqlen)
    exact = _run(folded, item_ids, lengths, "reference")
    assert (_run(folded, item_ids, lengths) - exact).abs().max() <= 1e-13 * exact.abs().max()
    single = folded.to(dtype=torch.float32)
    assert_as_good(
        _run(single, item_ids, lengths), _run(single, item_ids, lengths, "reference"), exact, slack=4.0
    )  # fmt: skip
    # A model as it starts loses less than a millionth; those above have weights that blow up what is rounded.
    start = fold(M2Rec(M2RecConfig(n_items=30, max_len=seqlen, gate="none")).double().eval())
    exact = _run(start, item_ids, lengths, "reference")
    got = _run(start.to(dtype=torch.float32), item_ids, lengths).double()
    assert (got - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    folded = fold(build())
    item_ids, lengths = batch(LENGTHS, 24)
    half = folded.to(dtype=dtype)
    assert_as_good(
        _run(half, item_ids, lengths),
        _run(half, item_ids, lengths, "reference"),
        _run(half.to(dtype=torch.float64), item_ids, lengths, "reference"),
    )


def test_rows_do_not_depend_on_their_batch_nor_on_threads(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    folded = fold(build(d_model=64)).to(dtype=torch.float32)
    item_ids, lengths = batch(LENGTHS * 3, 24)
    whole = _run(folded, item_ids, lengths)
    for b in range(len(LENGTHS)):
        assert torch.equal(_run(folded, item_ids[b : b + 1], lengths[b : b + 1])[0], whole[b]), b
    narrow = _run(folded, item_ids[:, :9], lengths.clamp(max=9))
    assert torch.equal(_run(folded, item_ids, lengths.clamp(max=9)), narrow), "slots behind all rows"
    monkeypatch.setattr(last_scan, "SLICE", 1)
    threads(3)
    assert torch.equal(_run(folded, item_ids, lengths), whole)
    found: list[Tensor] = []
    workers = [threading.Thread(target=lambda: found.append(_run(folded, item_ids, lengths))) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 8
    assert all(torch.equal(one, whole) for one in found)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("fields", VARIANTS, ids=identify)
def test_a_row_that_threads_share(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    """As if it were one of many, to the bit."""
    threads(3)
    for folded in (fold(build(**fields)), fold(build(**fields)).to(dtype=torch.float32)):
        item_ids, lengths = batch([min(n, folded.max_len) for n in LENGTHS], folded.max_len)
        whole = _run(folded, item_ids, lengths)
        with monkeypatch.context() as patched:
            patched.setattr(engine, "_shared", lambda *_: True)
            assert torch.equal(_run(folded, item_ids, lengths), whole)


def test_threads_share_rows_that_are_long_and_few(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    shared: list[list[int]] = []
    encode_rows = engine._encode_rows

    def noted(model: Any, arguments: tuple[Any, ...], seqlen: int) -> None:
        shared.append(arguments[1].tolist())
        encode_rows(model, arguments, seqlen)

    monkeypatch.setattr(engine, "_encode_rows", noted)
    folded = fold(build(d_model=64, max_len=800)).to(dtype=torch.float32)
    item_ids, lengths = batch([800, 799], 800)
    threads(1)
    whole = _run(folded, item_ids, lengths)
    threads(4)
    assert torch.equal(_run(folded, item_ids, lengths), whole)
    assert shared == [[800, 799]]
    _run(folded, item_ids, torch.tensor([800, 20]))
    threads(3)
    _run(folded, item_ids, lengths)
    assert shared == [[800, 799]], "one that is short, or more rows than threads have use for"
    assert torch.equal(_run(folded, item_ids[:1], lengths[:1]), whole[:1])
    assert shared == [[800, 799], [800]]
    found: list[Tensor] = []
    workers = [threading.Thread(target=lambda: found.append(_run(folded, item_ids[:1], lengths[:1]))) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 8
    assert all(torch.equal(one, whole[:1]) for one in found)
    assert len(shared) == 10
    with monkeypatch.context() as patched:
        patched.setattr(thread_pool, "_forked", True)  # a child has none of OpenMP's threads
        assert torch.equal(_run(folded, item_ids[:1], lengths[:1]), whole[:1])
    assert len(shared) == 10
    for place, wrong in ((0, -1), (799, 2**40)):
        broken = item_ids[:1].clone()
        broken[0, place] = wrong
        assert engine.encode_last(broken, lengths[:1], folded).isnan().all()
        with pytest.raises(ValueError, match="item_ids: expected ids from 1"):
            ops.encode_last(broken, lengths[:1], folded, impl="cpu")
    assert engine.encode_last(item_ids[:1], torch.tensor([801]), folded).isnan().all()


def test_strided_and_narrow_integers() -> None:
    folded = fold(build(gate="none"))
    item_ids, lengths = batch(LENGTHS, 24)
    expected = _run(folded, item_ids, lengths)
    wide = torch.stack([item_ids, item_ids + 1], dim=2).view(len(LENGTHS), 48)[:, ::2]
    for ids, n in ((item_ids.int(), lengths.int()), (wide, lengths), (item_ids.t().contiguous().t(), lengths)):
        assert torch.equal(_run(folded, ids, n), expected)


def test_what_is_not_sound_is_not_read() -> None:
    """The op refuses such rows; without its checks, as on the way from a service's own, the kernel gives NaN."""
    folded = fold(build(gate="scalar"))
    item_ids, lengths = batch([24] * 5, 24)
    sound = _run(folded, item_ids, lengths)
    item_ids[0, 3], item_ids[1, 23], item_ids[4, 0] = 2**40, -1, 0
    lengths[2] = 25
    got = engine.encode_last(item_ids, lengths, folded)
    assert got[[0, 1, 2, 4]].isnan().all()
    assert torch.equal(got[3], sound[3])
    for broken in (item_ids, item_ids.clamp(0, folded.n_items)):
        with pytest.raises(ValueError, match="item_ids: expected ids from 1"):
            ops.encode_last(broken, lengths.clamp(max=24), folded, impl="cpu")


def test_weights_are_packed_once_and_let_go() -> None:
    model = FoldedM2Rec(build(gate="none"))
    item_ids, lengths = batch(LENGTHS, 24)
    gc.collect()  # what other tests left
    before = len(engine._packed)
    first = model.encode(item_ids, lengths)
    assert engine.packed(model.folded) is engine.packed(model.folded)
    assert len(engine._packed) == before + 1
    other = dataclasses.replace(model.folded, D=model.folded.D + 1)
    assert not torch.equal(_run(other, item_ids, lengths), first)
    del model, other
    gc.collect()
    assert len(engine._packed) == before


def test_channels_are_packed_by_how_slowly_they_forget() -> None:
    model = build(d_model=64, gate="none")
    bias = model.get_parameter("encoder.layers.0.mamba.dt_proj.bias")
    with torch.no_grad():
        bias.copy_(torch.linspace(-6, 4, 128)[torch.randperm(128)])
    folded = fold(model)
    rates = torch.nn.functional.softplus(engine.by_decay(folded).step_bias) * engine.by_decay(folded).A.abs().amin(0)
    # What the items add to the bias, and the spread of A, blur the order of single channels, not of tiles.
    tiles = rates.view(4, 32).mean(1)
    assert (tiles.diff() > 0).all()
    item_ids, lengths = batch(LENGTHS, 24)
    exact = _run(folded, item_ids, lengths, "reference")
    assert (_run(folded, item_ids, lengths) - exact).abs().max() <= 1e-13 * exact.abs().max()


def test_empty_batch() -> None:
    folded = fold(build(gate="none"))
    assert _run(folded, torch.empty(0, 5, dtype=torch.int64), torch.empty(0, dtype=torch.int64)).shape == (0, 16)


def test_in_a_compiled_graph() -> None:
    folded = fold(build(gate="scalar"))
    item_ids, lengths = batch(LENGTHS, 24)
    compiled = torch.compile(
        lambda ids, n: ops.encode_last(ids, n, folded, impl="cpu"), backend="eager", fullgraph=True
    )
    with torch.no_grad():
        got = compiled(item_ids, lengths)
    torch.testing.assert_close(got, _run(folded, item_ids, lengths), rtol=1e-12, atol=1e-12)
