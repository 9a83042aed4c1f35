"""The frozen model: its answers are the model's, from any thread and any process, and what it refuses is named."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastm2rec import (
    BERT4Rec,
    BERT4RecConfig,
    ImplementationError,
    M2Rec,
    M2RecConfig,
    Recommendation,
    Recommendations,
    Recommender,
    SASRec,
    SASRecConfig,
    SequentialRecommender,
    StorageError,
    UnknownItemError,
    Vocabulary,
)
from fastm2rec._graphs import MAX_ROWS, bucket
from fastm2rec.training.evaluate import popularity
from tests import _runs

N_ITEMS, MAX_LEN = 40, 8
NAMES = [f"sku-{i}" for i in range(1, N_ITEMS + 1)]


def _model(kind: str = "m2rec", **fields: object) -> SequentialRecommender:
    torch.manual_seed(3)
    sizes: dict = {"n_items": N_ITEMS, "max_len": MAX_LEN, "d_model": 16, **fields}
    model: SequentialRecommender
    if kind == "sasrec":
        model = SASRec(SASRecConfig(**sizes))
    elif kind == "bert4rec":
        model = BERT4Rec(BERT4RecConfig(**sizes))
    else:
        model = M2Rec(M2RecConfig(d_state=4, gate="none", **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.vocab = Vocabulary(NAMES)
    return model.eval()


def _histories(count: int, longest: int = 20) -> list[list[str]]:
    lengths = torch.randint(1, longest + 1, (count,)).tolist()
    return [[NAMES[i] for i in torch.randint(0, N_ITEMS, (length,)).tolist()] for length in lengths]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("m2rec", {}),
        ("m2rec", {"filter_placement": "input", "spectrum": "valid"}),
        ("m2rec", {"n_layers": 2}),
        ("sasrec", {}),
        ("bert4rec", {}),
    ],
)
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_answers_are_the_models(kind: str, fields: dict[str, object], exclude_seen: bool) -> None:
    model = _model(kind, **fields).double()  # so that folding changes the last digits alone
    if isinstance(model, M2Rec):
        model.impl = "reference"
    recommender = Recommender(model)
    assert recommender.impl == "reference"  # the model's own
    histories = _histories(300)  # more than are encoded at once
    expected = model.recommend(histories, 7, exclude_seen=exclude_seen)
    for best, found in zip(expected, recommender.recommend(histories, 7, exclude_seen=exclude_seen), strict=True):
        assert [item for item, _ in found] == [item for item, _ in best]
        torch.testing.assert_close([score for _, score in found], [score for _, score in best], rtol=1e-9, atol=1e-9)
        assert (found.skipped, found.fallback) == (0, False)
    dense = [[NAMES.index(name) + 1 for name in history][-MAX_LEN:] for history in histories]
    item_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in dense], batch_first=True)
    query = recommender.encode_ids(item_ids, torch.tensor([len(row) for row in dense]))
    torch.testing.assert_close(recommender.encode(histories), query, rtol=1e-12, atol=1e-12)


def test_it_is_a_copy() -> None:
    for kind in ("m2rec", "sasrec"):
        model = _model(kind).train()
        recommender = Recommender(model)
        before = recommender.recommend([["sku-1", "sku-2"]])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert recommender.recommend([["sku-1", "sku-2"]]) == before
        assert model.training
        assert not recommender.encode([["sku-1"]]).requires_grad


def test_a_row_alone_and_in_a_batch() -> None:
    """Equal to the last bit, where the numba engine encodes: it computes row by row."""
    recommender = Recommender(_model(), impl="cpu")
    histories = _histories(64)
    together = recommender.recommend(histories)
    assert [recommender.recommend([history])[0] for history in histories] == together
    assert recommender.recommend(histories[:5]) + recommender.recommend(histories[5:]) == together


def test_sixteen_threads() -> None:
    for kind in ("m2rec", "sasrec"):
        recommender = Recommender(_model(kind))
        histories = _histories(160)
        batches = [histories[start : start + 5] for start in range(0, 160, 5)]
        expected = [recommender.recommend(batch) for batch in batches]
        barrier = threading.Barrier(16)

        def ask(place: int, recommender=recommender, batches=batches, expected=expected, barrier=barrier) -> bool:
            barrier.wait()
            order = range(place, place + len(batches))
            return all(recommender.recommend(batches[i % len(batches)]) == expected[i % len(batches)] for i in order)

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(ask, range(16)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("kind", ["m2rec", "sasrec"])
def test_a_forked_child_gives_the_same_answers(kind: str) -> None:
    """After the parent has used two threads: they do not exist in the child, which must not wait for them.

    One thread sums in another order than two in PyTorch's products: a few float32 roundings of scores of order ten.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        recommender = Recommender(_model(kind, max_len=64, d_model=64))
        histories = _histories(256, 64)  # enough for both threads
        expected = recommender.recommend(histories)
        torch.randn(600, 600) @ torch.randn(600, 600)
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # a child that hangs is killed
            same = False
            try:
                found = recommender.recommend(histories)
                same = found == expected or (kind != "m2rec" and _close(found, expected))
            finally:
                os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert recommender.recommend(histories) == expected
    finally:
        torch.set_num_threads(threads)


def _close(found: list[Recommendations], expected: list[Recommendations]) -> bool:
    scores = [[score for answer in answers for _, score in answer] for answers in (found, expected)]
    return scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-4)


def test_a_very_long_history() -> None:
    recommender = Recommender(_model())
    recent = NAMES[:MAX_LEN]
    long = [*(NAMES[:30] * 4000)[: 100_000 - MAX_LEN], *recent]
    best = recommender.recommend([long], 20)[0]
    assert {item for item, _ in best} == set(NAMES[30:])  # all of it was seen, and ten items are left
    every = recommender.recommend([recent], N_ITEMS - MAX_LEN)[0]
    assert best.items == [one for one in every if one.item in NAMES[30:]]


def test_unknown_items_and_empty_histories() -> None:
    model = _model()
    model.popularity = torch.tensor([0, 5, 9, 9, *[1] * (N_ITEMS - 3)])
    recommender = Recommender(model)
    one, two, three = recommender.recommend(
        [["nope", "sku-3", "neither"], ["nope"], []], 4, unknown="skip", empty="popular"
    )
    assert one.items == recommender.recommend([["sku-3"]], 4)[0].items
    popular = [Recommendation(name, count) for name, count in (("sku-2", 9), ("sku-3", 9), ("sku-1", 5), ("sku-4", 1))]
    assert (one.skipped, one.fallback) == (2, False)
    assert two == Recommendations(popular, 1, True)
    assert three == Recommendations(popular, 0, True)
    assert list(three) == three.items
    assert three[0] == popular[0]
    assert len(three) == 4
    with pytest.raises(UnknownItemError, match=r"histories\[1\]: unknown item id 'nope' at position 0"):
        recommender.recommend([["sku-1"], ["nope"]])
    with pytest.raises(ValueError, match=r"histories\[0\]: expected at least one item, got an empty history"):
        recommender.recommend([[]])
    with pytest.raises(ValueError, match=r"histories\[0\].*all of its 1 ids are unknown"):
        recommender.recommend([["nope"]], unknown="skip")
    with pytest.raises(ValueError, match="empty: expected 'error' or 'popular', got 'random'"):
        recommender.recommend([[]], empty="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="knows no item counts"):
        Recommender(_model()).recommend([["sku-1"]], empty="popular")
    assert recommender.recommend([]) == []
    for k in (0, N_ITEMS + 1, True):
        with pytest.raises(ValueError, match="k: expected an integer from 1 to 40"):
            recommender.recommend([["sku-1"]], k)
        with pytest.raises(ValueError, match="k: expected an integer from 1 to 40"):
            recommender.top(recommender.encode([["sku-1"]]), k)


def test_from_a_run(tmp_path: Path) -> None:
    _runs.run(tmp_path / "run", "m2rec")
    dataset = _runs.inputs().dataset
    recommender = Recommender.from_pretrained(tmp_path / "run")
    assert recommender.popularity is not None
    assert torch.equal(recommender.popularity, popularity(dataset))
    best = recommender.recommend([[]], 1, empty="popular")[0][0]
    counts = popularity(dataset)
    assert best.score == counts.max()
    assert dataset.vocab.encode([best.item]) == [int(counts.argmax())]
    assert Recommender.from_pretrained(str(tmp_path / "run" / "best"), impl="reference").impl == "reference"

    (tmp_path / "run" / "best" / "popularity.safetensors").unlink()  # a model from before there was one
    assert Recommender.from_pretrained(tmp_path / "run").popularity is None
    (tmp_path / "run" / "best" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(StorageError, match="truncated or not a safetensors file"):
        Recommender.from_pretrained(tmp_path / "run")
    with pytest.raises(StorageError, match="cannot read .*nowhere"):
        Recommender.from_pretrained(tmp_path / "nowhere")


def test_counts_of_another_model_are_refused(tmp_path: Path) -> None:
    model = _model()
    model.popularity = torch.arange(N_ITEMS + 1)
    model.save_pretrained(tmp_path / "one")
    other = _model(d_model=8)
    other.popularity = model.popularity
    other.save_pretrained(tmp_path / "other")
    file = "popularity.safetensors"
    (tmp_path / "one" / file).write_bytes((tmp_path / "other" / file).read_bytes())
    with pytest.raises(StorageError, match=f"{file} was not saved with this config.json"):
        Recommender.from_pretrained(tmp_path / "one")
    model.popularity = None
    model.save_pretrained(tmp_path / "one")  # the file goes with the counts
    assert Recommender.from_pretrained(tmp_path / "one").popularity is None


def test_which_implementation() -> None:
    assert Recommender(_model(), impl="cpu").impl == "cpu"
    assert Recommender(_model(n_layers=2), impl="reference").impl == "reference"
    assert Recommender(_model("sasrec")).impl == "reference"
    with pytest.raises(ImplementationError, match="impl='cpu' was asked for a SASRec, which is plain PyTorch"):
        Recommender(_model("sasrec"), impl="cpu")
    with pytest.raises(ImplementationError, match="impl='fast' was asked for encode_last"):
        Recommender(_model(), impl="fast")


def test_half_precision_scores_in_float32() -> None:
    recommender = Recommender(_model(), dtype=torch.bfloat16)
    assert recommender.encode([["sku-1"]]).dtype == torch.bfloat16
    scores, _ = recommender.top(recommender.encode([["sku-1"]]), 3)
    assert scores.dtype == torch.float32


def test_buckets() -> None:
    assert [bucket(size, 16, 50) for size in (1, 16, 17, 33, 50)] == [16, 16, 32, 50, 50]
    assert [bucket(size, 1, MAX_ROWS) for size in (1, 2, 3, 200, 256)] == [1, 2, 4, 256, 256]
    assert bucket(3, 16, 8) == 8  # a model of fewer slots than the least bucket


@pytest.mark.gpu
def test_graphs_give_the_answers_of_the_kernels(device: torch.device) -> None:
    model = _model(max_len=50)
    recommender = Recommender(model, device=device)
    histories = _histories(2 * MAX_ROWS + 3, 60)
    dense = [torch.tensor([NAMES.index(name) + 1 for name in history][-50:]) for history in histories]
    lengths = torch.tensor([len(row) for row in dense])
    item_ids = torch.nn.utils.rnn.pad_sequence(dense, batch_first=True)
    for count in (1, 3, len(histories)):
        for _ in range(2):  # captured, then replayed
            query = recommender.encode(histories[:count])
            expected = recommender.encode_ids(item_ids[:count], lengths[:count])
            # The kernels may cut other bucket sizes otherwise: a few float32 roundings of values of order one.
            torch.testing.assert_close(query, expected, rtol=1e-5, atol=1e-5)
    expected_answers = [recommender.recommend([history]) for history in histories[:40]]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda history: recommender.recommend([history]), histories[:40])) == expected_answers
