"""The synthetic log has the structure that it promises; above all, its spectrum peaks at one over the period."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from fastm2rec.data import synthetic


def _groups(log: pl.DataFrame, groups: int, length: int) -> torch.Tensor:
    """The group of every event, [n_users, length]: item i + 1 is in group i mod groups."""
    return (torch.from_numpy(log["item"].to_numpy().copy()).view(-1, length) - 1) % groups


def test_sizes_and_columns() -> None:
    made = synthetic(n_users=6, n_items=25, length=8, periods=(3, 7), text_dim=5)
    log = made.log
    assert log.schema == {"user": pl.Int64, "item": pl.Int64, "timestamp": pl.Int64}
    assert log["user"].to_list() == [user for user in range(1, 7) for _ in range(8)]
    assert log["timestamp"].to_list() == 6 * [86_400 * day for day in range(8)]
    assert log["item"].is_between(1, 25).all()
    assert made.items["item"].to_list() == list(range(1, 26))
    assert made.items["categories"].to_list() == [[f"group {item % 7}"] for item in range(25)]
    assert made.text.shape == (26, 5)
    assert not made.text[0].any()
    assert made.text[1:].any(dim=1).all()


def test_the_log_is_a_function_of_the_seed() -> None:
    sizes: dict[str, Any] = {"n_users": 20, "n_items": 30, "length": 20}
    one = synthetic(seed=3, **sizes)
    torch.rand(7)
    again, other = synthetic(seed=3, **sizes), synthetic(seed=4, **sizes)
    assert_frame_equal(one.log, again.log)
    assert_frame_equal(one.items, again.items)
    assert torch.equal(one.text, again.text)
    assert not one.log.equals(other.log)
    assert not torch.equal(one.text, other.text)


def test_without_noise_users_walk_through_the_groups_of_their_period() -> None:
    periods = (7, 5)
    made = synthetic(n_users=40, n_items=31, length=30, periods=periods, noise=0)
    groups = _groups(made.log, 7, 30)
    for place, walk in enumerate(groups):
        period = periods[place % 2]
        assert torch.equal(walk, (walk[0] + torch.arange(30)) % period)
    # Every item is reached: 1,200 draws, and the rarest is taken with probability at least 1/2 * 1/7 * 1/5 each.
    assert made.log["item"].n_unique() == 31


def test_noise_is_the_share_of_events_off_the_walk() -> None:
    users, length, noise = 200, 50, 0.3
    groups = _groups(synthetic(users, 70, length, (7,), noise).log, 7, length)
    phases = (groups - torch.arange(length)) % 7
    off = (phases != phases.mode(dim=1).values[:, None]).double().mean().item()
    # A random item is of another group 6 times in 7. Four standard deviations of a binomial share; the seed is fixed.
    expected = noise * 6 / 7
    assert off == pytest.approx(expected, abs=4 * (expected * (1 - expected) / (users * length)) ** 0.5)
    everything = synthetic(users, 70, length, (7,), 1.0).log["item"]
    assert everything.n_unique() == 70


@pytest.mark.parametrize(("periods", "noise"), [((7,), 0.1), ((5,), 0.1), ((7, 5), 0.1), ((7,), 0.5)])
def test_the_spectrum_peaks_at_one_over_the_period(periods: tuple[int, ...], noise: float) -> None:
    length = 70  # a multiple of 7 and of 5, so that 1/7 and 1/5 cycles per sample are bins
    made = synthetic(n_users=200, n_items=140, length=length, periods=periods, noise=noise)
    groups = _groups(made.log, max(periods), length)
    frequency = torch.fft.rfftfreq(length)
    for place, period in enumerate(periods):
        indicator = (groups[place :: len(periods)] == 2).double()
        power = torch.fft.rfft(indicator - indicator.mean(dim=1, keepdim=True)).abs().square().mean(dim=0)
        # One step in `period` makes a comb: all harmonics of 1/period are as strong as the fundamental but for noise.
        harmonics = {round(k * length / period) for k in range(1, period // 2 + 1)}
        assert set(power.topk(len(harmonics)).indices.tolist()) == harmonics
        fundamental = length // period
        assert frequency[fundamental].item() == pytest.approx(1 / period)
        # Up to one and a half times it there is nothing else that comes near.
        low = power[: fundamental * 3 // 2].clone()
        assert int(low.argmax()) == fundamental
        low[fundamental] = 0
        assert low.max() < power[fundamental] / 3


def test_the_text_tells_the_group_of_an_item() -> None:
    made = synthetic(n_items=140, periods=(7,), text_dim=32)
    direction = torch.nn.functional.normalize(made.text[1:], dim=1)
    group = torch.arange(140) % 7
    centres = torch.stack([direction[group == g].mean(dim=0) for g in range(7)])
    assert torch.equal((direction @ centres.T).argmax(dim=1), group)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_users": 0}, "n_users: expected at least 1, got 0"),
        ({"n_items": 0}, "n_items: expected at least 1, got 0"),
        ({"length": 0}, "length: expected at least 1, got 0"),
        ({"text_dim": 0}, "text_dim: expected at least 1, got 0"),
        ({"periods": ()}, r"periods: expected numbers from 2 to n_items=140, got \(\)"),
        ({"periods": (1, 7)}, "periods: expected numbers from 2"),
        ({"n_items": 6}, r"periods: expected numbers from 2 to n_items=6, got \(7, 5\)"),
        ({"noise": 1.5}, "noise: expected a share from 0 to 1, got 1.5"),
        ({"noise": float("nan")}, "noise: expected a share from 0 to 1, got nan"),
    ],
)
def test_wrong_sizes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic(**options)
