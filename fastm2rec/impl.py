"""Which implementation of an op runs: the one place where that is decided.

An implementation asked for by name runs or raises; `"auto"` takes the best one that can run on the given device, and
`chosen` says which one that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

AUTO = "auto"


class ImplementationError(RuntimeError):
    """The implementation that was asked for does not exist, or cannot run here."""


def _reference() -> dict[str, Callable[..., Any]]:
    # Imports in a function are late, and unlike importlib's they can be traced by torch.compile.
    from .reference.causal_conv1d import causal_conv1d
    from .reference.gated_fusion import gated_fusion
    from .reference.last_state import last_state
    from .reference.selective_scan import selective_scan
    from .reference.spectral_projection import spectral_projection

    return {
        "causal_conv1d": causal_conv1d,
        "gated_fusion": gated_fusion,
        "last_state": last_state,
        "selective_scan": selective_scan,
        "spectral_projection": spectral_projection,
    }


@dataclass(frozen=True)
class _Implementation:
    """One way to compute the ops."""

    load: Callable[[], dict[str, Callable[..., Any]]]
    ops: frozenset[str]
    # None where it can run on the device, else the reason why it cannot.
    why_not: Callable[[torch.device], str | None]


_OPS = frozenset({"spectral_projection", "causal_conv1d", "selective_scan", "last_state", "gated_fusion"})

# In the order in which "auto" tries them.
_IMPLEMENTATIONS: dict[str, _Implementation] = {
    "reference": _Implementation(_reference, _OPS, lambda device: None),
}


def names() -> tuple[str, ...]:
    """Every word that `impl=` takes."""
    return (AUTO, *_IMPLEMENTATIONS)


def unavailable(op: str, impl: str, device: torch.device | str) -> str | None:
    """Why `op` cannot run through `impl` on `device`; None if it can.

    Raises:
        ValueError: `op` is not one of the package's ops.
    """
    if op not in _OPS:
        raise ValueError(f"op: expected one of {', '.join(sorted(_OPS))}, got {op!r}")
    if impl == AUTO:
        return None
    if impl not in _IMPLEMENTATIONS:
        return f"there is no implementation {impl!r} in this version; there are {', '.join(names())}"
    entry = _IMPLEMENTATIONS[impl]
    if op not in entry.ops:
        return f"implementation {impl!r} has no {op}"
    return entry.why_not(torch.device(device))


def chosen(op: str, impl: str, device: torch.device | str) -> str:
    """The name of the implementation that runs when `impl` is asked for.

    Raises:
        ImplementationError: `impl` was asked for by name and cannot run; the message says why.
    """
    if impl == AUTO:
        for name in _IMPLEMENTATIONS:  # the reference runs everywhere, so one is always found
            if unavailable(op, name, device) is None:
                return name
    reason = unavailable(op, impl, device)
    if reason is not None:
        raise ImplementationError(f"impl={impl!r} was asked for {op} on {torch.device(device)}: {reason}")
    return impl


def resolve(op: str, impl: str, device: torch.device | str) -> Callable[..., Any]:
    """The function that computes `op` when `impl` is asked for on `device`.

    Raises:
        ImplementationError: as `chosen`.
    """
    return _IMPLEMENTATIONS[chosen(op, impl, device)].load()[op]
