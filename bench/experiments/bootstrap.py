"""Is one model better than another? A paired bootstrap over users.

Users are drawn with replacement, the same ones for both models; the mean difference of each draw makes a distribution,
and its 2.5 and 97.5 % quantiles the interval. Where several seeds were trained, a user's value is the mean over them.
The interval speaks of other users, not of other seeds: the difference within each seed stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.experiments.ranks import per_user

DRAWS = 2000
METRICS = ("HR@10", "NDCG@10")


def compare(
    ours: Mapping[int, np.ndarray], theirs: Mapping[int, np.ndarray], metric: str, draws: int = DRAWS
) -> dict[str, Any]:
    """The difference ours - theirs in `metric` at the ranks of the same users, by seed.

    Args:
        ours, theirs: seed to ranks [n_users] int64; seeds that only one of them has are left out.
        metric: HR@k, NDCG@k or AUC@n; see `ranks.per_user`.
        draws: how many samples of users.

    Returns:
        JSON-ready: `difference`, `low` and `high` (its interval), `relative` with `relative_low` and `relative_high`
        (the same over theirs; None where theirs is 0), `by_seed`, `users`.

    Raises:
        ValueError: no seed in common, or other users.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError(f"ours, theirs: expected a seed in common, got {sorted(ours)} and {sorted(theirs)}")
    a = np.stack([per_user(ours[seed], metric) for seed in seeds])
    b = np.stack([per_user(theirs[seed], metric) for seed in seeds])
    if a.shape != b.shape:
        raise ValueError(f"ours, theirs: expected the same users, got {a.shape[1]} and {b.shape[1]}")
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    users = len(mean_a)
    generator = np.random.default_rng(0)
    drawn = np.empty((draws, 2))
    for draw in range(draws):
        weight = np.bincount(generator.integers(users, size=users), minlength=users)
        drawn[draw] = weight @ mean_a / users, weight @ mean_b / users
    low, high = np.quantile(drawn[:, 0] - drawn[:, 1], [0.025, 0.975])
    values: dict[str, Any] = {
        "metric": metric,
        "difference": float(mean_a.mean() - mean_b.mean()),
        "low": float(low),
        "high": float(high),
        "by_seed": {str(seed): float(x.mean() - y.mean()) for seed, x, y in zip(seeds, a, b, strict=True)},
        "users": users,
    }
    if (drawn[:, 1] > 0).all():
        bounds = np.quantile(drawn[:, 0] / drawn[:, 1] - 1, [0.025, 0.975])
        relative = [float(mean_a.mean() / mean_b.mean() - 1), *map(float, bounds)]
    else:
        relative = [None, None, None]  # type: ignore[list-item]
    return values | dict(zip(("relative", "relative_low", "relative_high"), relative, strict=True))
