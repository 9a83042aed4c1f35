"""A log whose structure is known: users who come back to the same kind of item every so many steps.

It needs no file and no network, a model can learn it, and its spectrum has its peaks where the periods say, at 1 / p
and at its multiples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._polars import pl
from .delimited import item_frame


class Synthetic(NamedTuple):
    """A log, its item table, and text embeddings [n_items + 1, text_dim] (row i for item i, row 0 zero)."""

    log: pl.DataFrame
    items: pl.DataFrame
    text: Tensor


def synthetic(
    n_users: int = 500,
    n_items: int = 140,
    length: int = 60,
    periods: tuple[int, ...] = (7, 5),
    noise: float = 0.1,
    text_dim: int = 32,
    seed: int = 0,
) -> Synthetic:
    """Users with a period of their own walk through the item groups 0, 1, ..., period - 1, 0, 1, ...

    The catalogue is cut into `max(periods)` groups of equal size. At step t a user with period p and phase s takes a
    random item of group (t + s) mod p, or with probability `noise` any item. Time advances by one day a step. The text
    embedding of an item is its group's random direction plus its own. The indicator of a group along a user's sequence
    has its slowest spectral peak at 1 / p cycles per sample; unrelated kinds have others at its multiples.

    Args:
        n_users, n_items, length: sizes; every user has `length` events.
        periods: the periods in steps, at least 2 each; users take them in turn.
        noise: share of events that are random.
        text_dim: T, width of the text embeddings.
        seed: the log is a function of it and of the sizes.

    Raises:
        ValueError: sizes below 1, a period below 2 or above n_items, or a noise outside [0, 1].
    """
    groups = max(periods, default=0)
    for name, value in (("n_users", n_users), ("n_items", n_items), ("length", length), ("text_dim", text_dim)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not periods or min(periods) < 2 or groups > n_items:
        raise ValueError(f"periods: expected numbers from 2 to n_items={n_items}, got {periods}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise: expected a share from 0 to 1, got {noise}")
    generator = torch.Generator().manual_seed(seed)
    user = torch.arange(n_users)[:, None]
    period = torch.tensor(periods)[user % len(periods)]
    phase = torch.randint(0, 2**31, (n_users, 1), generator=generator) % period
    group = (torch.arange(length) + phase) % period

    item_group = torch.arange(n_items) % groups  # item i + 1 is in group i mod groups
    group_size = torch.bincount(item_group, minlength=groups)
    member = (torch.rand(n_users, length, generator=generator) * group_size[group]).long()
    item = group + groups * member + 1
    anything = torch.randint(1, n_items + 1, (n_users, length), generator=generator)
    item = torch.where(torch.rand(n_users, length, generator=generator) < noise, anything, item)

    log = pl.DataFrame(
        {
            "user": (user + 1).expand(n_users, length).flatten().numpy(),
            "item": item.flatten().numpy(),
            "timestamp": (86_400 * torch.arange(length)).expand(n_users, length).flatten().numpy(),
        }
    )
    names = [f"Item {i + 1} of group {int(item_group[i])}" for i in range(n_items)]
    table = item_frame(
        pl.Series(range(1, n_items + 1)), pl.Series(names), pl.Series([[f"group {int(g)}"] for g in item_group])
    )
    directions = torch.randn(groups, text_dim, generator=generator)
    text = torch.zeros(n_items + 1, text_dim)
    text[1:] = directions[item_group] + 0.3 * torch.randn(n_items, text_dim, generator=generator)
    return Synthetic(log, table, text)
