"""Cross-entropy over the catalogue and BCE with sampled negatives, against the formulas written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastm2rec import losses
from fastm2rec.losses import next_item_loss
from fastm2rec.reference import cross_entropy as reference


def _written_out(query: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax over the items 1..n_items, [B]."""
    scores = query @ weight[1:].t()
    return scores.exp().sum(dim=1).log() - scores[torch.arange(len(query)), targets - 1]


def _case(rows: int, n_items: int = 37, d: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    query = torch.randn(rows, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(n_items + 1, d, dtype=dtype, requires_grad=True)
    return query, weight, torch.randint(1, n_items + 1, (rows,))


def _gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


# In float64 both sides of a comparison round some hundred numbers of order 1 to 10 by 2^-53 each; a wrong term would be
# off by more than 1 / n_items. 1e-12 stands far from both.
FLOAT64: dict[str, Any] = {"rtol": 0.0, "atol": 1e-12}


@pytest.mark.parametrize("rows", [1, 128, 129, 300])  # more than 128 rows go in pieces on a CPU
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ce_and_its_gradients(rows: int, reduction: losses.Reduction) -> None:
    query, weight, targets = _case(rows)
    loss = next_item_loss(query, weight, targets, reduction=reduction)
    each = _written_out(query, weight, targets)
    expected = each.mean() if reduction == "mean" else each.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=1e-12)
    for ours, theirs in zip(_gradients(loss, query, weight), _gradients(expected, query, weight), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_padding_takes_no_part(kind: losses.Loss) -> None:
    query, weight, targets = _case(200)
    results = []
    for padding in (0.0, 1e6):
        with torch.no_grad():
            weight[0] = padding
        loss = next_item_loss(query, weight, targets, kind, 3, torch.Generator().manual_seed(1))
        gradients = _gradients(loss, query, weight)
        assert not gradients[1][0].any()
        results.append((loss, *gradients))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_pieces_of_float32_are_as_good_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    query, weight, targets = _case(300, dtype=torch.float32)
    exact = _written_out(query.double(), weight.double(), targets).mean()
    truth = _gradients(exact, query, weight)
    errors = []
    for rows in (128, 10_000):
        monkeypatch.setattr(reference, "CPU_ROWS", rows)
        loss = next_item_loss(query, weight, targets, impl="reference")
        ours = _gradients(loss, query, weight)
        errors.append(
            [float((a.double() - b).detach().norm()) for a, b in zip((loss, *ours), (exact, *truth), strict=True)]
        )
    for pieces, whole, size in zip(*errors, (exact, *truth), strict=True):
        # Both round; either may be luckier by a few float32 roundings of a result of this size.
        assert pieces <= 2 * whole + 4 * 2.0**-24 * float(size.detach().norm())


def _negatives_of(monkeypatch: pytest.MonkeyPatch, targets: Tensor, n_items: int, n: int, seed: int) -> Tensor:
    """The negatives [B, n] that a call draws: every item's vector says which one it is, and softplus lets it pass."""
    seen: list[Tensor] = []

    def spy(scores: Tensor) -> Tensor:
        seen.append(scores)
        return scores

    weight = torch.arange(n_items + 1.0).unsqueeze(1)
    with monkeypatch.context() as patch:
        patch.setattr(F, "softplus", spy)
        next_item_loss(torch.ones(len(targets), 1), weight, targets, "bce", n, torch.Generator().manual_seed(seed))
    return seen[1].long()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bce_and_its_gradients(monkeypatch: pytest.MonkeyPatch, reduction: losses.Reduction) -> None:
    query, weight, targets = _case(50)
    negatives = _negatives_of(monkeypatch, targets, 37, 4, seed=9)
    loss = next_item_loss(query, weight, targets, "bce", 4, torch.Generator().manual_seed(9), reduction)
    total = query.new_zeros(())
    for row, target in enumerate(targets.tolist()):
        total = total - torch.sigmoid(query[row] @ weight[target]).log()
        for negative in negatives[row].tolist():
            total = total - torch.sigmoid(-(query[row] @ weight[negative])).log()
    expected = total / 50 if reduction == "mean" else total
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=1e-12)
    for ours, theirs in zip(_gradients(loss, query, weight), _gradients(expected, query, weight), strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT64)


def test_negatives_are_all_items_but_the_target_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    n_items, draws = 5, 4000
    targets = torch.arange(1, n_items + 1)
    negatives = _negatives_of(monkeypatch, targets, n_items, draws, seed=0)
    assert negatives.shape == (n_items, draws)
    for target, row in zip(targets.tolist(), negatives, strict=True):
        counts = torch.bincount(row, minlength=n_items + 1)
        assert counts[target] == counts[0] == 0
        others = counts[counts > 0]
        assert len(counts) == n_items + 1
        assert len(others) == n_items - 1
        # Five standard deviations of a binomial count.
        share = 1 / (n_items - 1)
        assert (others - draws * share).abs().max() < 5 * (draws * share * (1 - share)) ** 0.5


def test_negatives_come_from_the_generator_or_the_global_one() -> None:
    query, weight, targets = _case(20)
    one = next_item_loss(query, weight, targets, "bce", generator=torch.Generator().manual_seed(1))
    assert torch.equal(next_item_loss(query, weight, targets, "bce", generator=torch.Generator().manual_seed(1)), one)
    assert not torch.equal(
        next_item_loss(query, weight, targets, "bce", generator=torch.Generator().manual_seed(2)), one
    )
    torch.manual_seed(1)
    assert torch.equal(next_item_loss(query, weight, targets, "bce"), one)


@pytest.mark.parametrize("kind", ["ce", "bce"])
@pytest.mark.parametrize("rows", [20, 200])
def test_autocast_does_not_lower_the_loss_to_bfloat16(kind: losses.Loss, rows: int) -> None:
    query, weight, targets = _case(rows, dtype=torch.float32)
    plain = next_item_loss(query, weight, targets, kind, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert (query @ weight.t()).dtype == torch.bfloat16
        inside = next_item_loss(query, weight, targets, kind, generator=torch.Generator().manual_seed(1))
        low = next_item_loss(query.bfloat16(), weight, targets, kind, generator=torch.Generator().manual_seed(1))
    assert torch.equal(inside, plain)
    exact = next_item_loss(
        query.double(), weight.double(), targets, kind, generator=torch.Generator().manual_seed(1)
    ).detach()
    # Each row sums 8 products and 37 exponentials; bfloat16 would lose 2^-9 in the products alone.
    torch.testing.assert_close(plain.detach().double(), exact, rtol=(8 + 37) * 2.0**-24, atol=0)
    assert low.dtype == torch.float32
    widened = query.bfloat16().float()
    assert torch.equal(low, next_item_loss(widened, weight, targets, kind, generator=torch.Generator().manual_seed(1)))


def test_wrong_arguments_are_named() -> None:
    query, weight, targets = torch.randn(4, 3), torch.randn(6, 3), torch.tensor([1, 2, 3, 4])
    with pytest.raises(ValueError, match="kind: expected 'ce' or 'bce', got 'mse'"):
        next_item_loss(query, weight, targets, "mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction: expected 'mean' or 'sum', got 'none'"):
        next_item_loss(query, weight, targets, reduction="none")  # type: ignore[arg-type]
    for shapes in ((torch.randn(4), weight, targets), (query, weight[:, :2], targets), (query, weight, targets[:3])):
        with pytest.raises(ValueError, match="query, weight, targets: expected shapes"):
            next_item_loss(*shapes)
    with pytest.raises(ValueError, match="n_negatives: expected at least 1, got 0"):
        next_item_loss(query, weight, targets, "bce", 0)
    with pytest.raises(ValueError, match="weight: expected at least two items for a negative to exist, got 1"):
        next_item_loss(query, torch.randn(2, 3), torch.ones(4, dtype=torch.int64), "bce")
