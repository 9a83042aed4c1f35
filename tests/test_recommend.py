"""`recommend`: ids as the user knows them in, the best unseen items out, and an error for what is no history."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastm2rec import M2Rec, M2RecConfig, UnknownItemError, Vocabulary

N_ITEMS, MAX_LEN = 12, 6
NAMES = [f"sku-{i}" for i in range(N_ITEMS)]


def _model(vocab: Vocabulary | None) -> M2Rec:
    torch.manual_seed(1)
    config = M2RecConfig(n_items=N_ITEMS, max_len=MAX_LEN, d_model=16, d_state=2, gate="none", spectrum="valid")
    model = M2Rec(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.vocab = vocab
    return model


NAMED = _model(Vocabulary(NAMES))
PLAIN = _model(None)

histories = st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=20), min_size=0, max_size=7)


@settings(deadline=None, max_examples=50)
@given(histories, st.integers(1, N_ITEMS), st.booleans(), st.integers(1, 5))
def test_what_every_answer_has(rows: list[list[str]], k: int, exclude_seen: bool, batch_size: int) -> None:
    answer = NAMED.recommend(rows, k, exclude_seen=exclude_seen, batch_size=batch_size)
    assert len(answer) == len(rows)
    for history, best in zip(rows, answer, strict=True):
        items = [item for item, _ in best]
        left = set(NAMES) - set(history) if exclude_seen else set(NAMES)
        assert len(items) == min(k, len(left))
        assert len(set(items)) == len(items)
        assert set(items) <= left
        scores = [score for _, score in best]
        assert scores == sorted(scores, reverse=True)
        assert np.isfinite(scores).all()


@settings(deadline=None, max_examples=30)
@given(histories.filter(bool))
def test_scores_are_those_of_the_whole_catalogue(rows: list[list[str]]) -> None:
    NAMED.eval()
    for history, best in zip(rows, NAMED.recommend(rows, N_ITEMS, exclude_seen=False), strict=True):
        ids = [NAMES.index(name) + 1 for name in history][-MAX_LEN:]
        with torch.no_grad():
            scores = NAMED.score(NAMED(torch.tensor([ids]), torch.tensor([len(ids)])))[0, 1:]
        expected = [NAMES[int(i)] for i in scores.argsort(descending=True)]
        assert [item for item, _ in best] == expected
        np.testing.assert_allclose([score for _, score in best], scores.sort(descending=True).values, atol=1e-5)


def test_dense_ids_where_the_model_has_no_vocabulary() -> None:
    named = NAMED.recommend([["sku-0", "sku-4"]], 3)
    dense = PLAIN.recommend([[1, 5]], 3)
    assert [NAMES[int(item) - 1] for item, _ in dense[0]] == [item for item, _ in named[0]]
    assert PLAIN.recommend(np.array([[1, 5]]), 3) == dense
    assert PLAIN.recommend([torch.tensor([1, 5])], 3) == dense


def test_only_the_last_items_are_read_but_all_are_excluded() -> None:
    recent = NAMES[2 : 2 + MAX_LEN]
    short, long = NAMED.recommend([recent, ["sku-0", "sku-1", *recent]], N_ITEMS)
    assert {item for item, _ in long} == set(NAMES[2 + MAX_LEN :])
    expected = [best for best in short if best.item not in ("sku-0", "sku-1")]
    assert [item for item, _ in long] == [item for item, _ in expected]
    np.testing.assert_allclose([score for _, score in long], [score for _, score in expected], rtol=1e-5)


def test_equal_scores_come_in_the_order_of_the_catalogue() -> None:
    model = _model(None)
    with torch.no_grad():
        model.item_embedding.weight[1:] = 0.5
    assert [item for item, _ in model.recommend([[3]], N_ITEMS)[0]] == [1, 2, *range(4, N_ITEMS + 1)]


def test_a_training_model_stays_in_training_and_answers_without_dropout() -> None:
    model = _model(None).train()
    assert model.recommend([[1, 2]], 3) == model.recommend([[1, 2]], 3)
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("k", [0, -1, N_ITEMS + 1, 2.0, "3"])
def test_k_outside_the_catalogue(k: int) -> None:
    with pytest.raises(ValueError, match="k: expected an integer from 1 to 12, the size of the catalogue, got"):
        NAMED.recommend([["sku-1"]], k)


def test_histories_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"histories\[1\]: expected at least one item, got an empty history$"):
        NAMED.recommend([["sku-1"], []])
    with pytest.raises(UnknownItemError, match=r"histories\[1\]: unknown item id 'nope' at position 2"):
        NAMED.recommend([["sku-1"], ["sku-1", "sku-2", "nope"]])
    with pytest.raises(ValueError, match=r"histories\[0\].*all of its 1 ids are unknown and were skipped"):
        NAMED.recommend([["nope"]], unknown="skip")
    with pytest.raises(TypeError, match="expected a sequence of item ids at position 0, got 'sku-1'"):
        NAMED.recommend(["sku-1", "sku-2"])
    with pytest.raises(TypeError, match="expected a sequence of item ids at position 0, got 7"):
        PLAIN.recommend([7])  # type: ignore[list-item]
    with pytest.raises(UnknownItemError, match=r"did you mean 3\?"):
        PLAIN.recommend([["3"]])
    assert NAMED.recommend([["nope", "sku-3"]], 2, unknown="skip") == NAMED.recommend([["sku-3"]], 2)
    assert NAMED.recommend([], 2) == []
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        NAMED.recommend([["sku-1"]], batch_size=0)
