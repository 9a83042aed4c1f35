"""Which implementation of an op runs: the one place where that is decided.

An implementation asked for by name runs or raises; `"auto"` takes the best one that can run on the given device, and
`chosen` says which one that is.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import cpu

AUTO = "auto"


class ImplementationError(RuntimeError):
    """The implementation that was asked for does not exist, or cannot run here."""


def _on_their_device(functions: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Each with the device of its first tensor as the current one, where Triton launches whatever it is given."""

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
            # A compiled graph sees to it itself.
            if not x.is_cuda or torch.compiler.is_compiling() or torch.cuda.device_count() < 2:
                return function(x, *rest, **options)
            with torch.cuda.device(x.device):
                return function(x, *rest, **options)

        return call

    return {name: guarded(function) for name, function in functions.items()}


def _with_filter(functions: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """And `filtered_last_scan`, as the two steps that it has."""
    from .reference.filtered_last_scan import filtered_last_scan

    both = partial(filtered_last_scan, project=functions["spectral_projection"], scan=functions["last_scan"])
    return {**functions, "filtered_last_scan": both}


def _reference() -> dict[str, Callable[..., Any]]:
    # Imports in a function are late, and unlike importlib's they can be traced by torch.compile.
    from .reference.causal_conv1d import causal_conv1d
    from .reference.cross_entropy import cross_entropy
    from .reference.embed_norm import embed_norm
    from .reference.encode_last import encode_last
    from .reference.gated_fusion import gated_fusion
    from .reference.last_scan import last_scan
    from .reference.last_state import last_state
    from .reference.output_ffn import output_ffn
    from .reference.selective_scan import selective_scan
    from .reference.spectral_projection import spectral_projection, spectral_projection_fft

    return _with_filter(
        {
            "causal_conv1d": causal_conv1d,
            "cross_entropy": cross_entropy,
            "embed_norm": embed_norm,
            "encode_last": encode_last,
            "gated_fusion": gated_fusion,
            "last_scan": last_scan,
            "last_state": last_state,
            "output_ffn": output_ffn,
            "selective_scan": selective_scan,
            "spectral_projection": spectral_projection,
            "spectral_projection_fft": spectral_projection_fft,
        }
    )


def _cpu() -> dict[str, Callable[..., Any]]:
    from .cpu.causal_conv1d import causal_conv1d
    from .cpu.cross_entropy import cross_entropy
    from .cpu.embed_norm import embed_norm
    from .cpu.encode_last import encode_last
    from .cpu.filtered_last_scan import filtered_last_scan
    from .cpu.last_scan import last_scan
    from .cpu.output_ffn import output_ffn
    from .cpu.selective_scan import selective_scan
    from .cpu.spectral_projection import spectral_projection

    return {
        **_reference(),
        "causal_conv1d": causal_conv1d,
        "cross_entropy": cross_entropy,
        "embed_norm": embed_norm,
        "encode_last": encode_last,
        "filtered_last_scan": filtered_last_scan,
        "last_scan": last_scan,
        "output_ffn": output_ffn,
        "selective_scan": selective_scan,
        "spectral_projection": spectral_projection,
    }


def _triton() -> dict[str, Callable[..., Any]]:
    from .kernels.causal_conv1d import causal_conv1d
    from .kernels.encode_last import encode_last
    from .kernels.gated_fusion import gated_fusion
    from .kernels.last_state import last_state
    from .kernels.selective_scan import selective_scan
    from .kernels.spectral_fft import spectral_projection_fft
    from .kernels.spectral_projection import spectral_projection
    from .reference.cross_entropy import cross_entropy
    from .reference.embed_norm import embed_norm
    from .reference.last_scan import last_scan
    from .reference.output_ffn import output_ffn

    return _with_filter(
        _on_their_device(
            {
                "causal_conv1d": causal_conv1d,
                "cross_entropy": cross_entropy,
                "embed_norm": embed_norm,
                "encode_last": encode_last,
                "gated_fusion": gated_fusion,
                "last_scan": partial(last_scan, scan=last_state),
                "last_state": last_state,
                "output_ffn": output_ffn,
                "selective_scan": selective_scan,
                "spectral_projection": spectral_projection,
                "spectral_projection_fft": spectral_projection_fft,
            }
        )
    )


def _mamba_ssm() -> dict[str, Callable[..., Any]]:
    from ._mamba_ssm import causal_conv1d, last_state, selective_scan
    from .reference.last_scan import last_scan

    return _with_filter(
        _on_their_device(
            {
                **_triton(),  # the ops around the scan
                "causal_conv1d": causal_conv1d,
                "last_scan": partial(last_scan, scan=last_state),
                "last_state": last_state,
                "selective_scan": selective_scan,
            }
        )
    )


def _cpu_lacks(device: str) -> str | None:
    return cpu.missing() if device.startswith("cpu") else "the numba engine runs on CPUs only"


_HAS_TRITON = importlib.util.find_spec("triton") is not None  # here, as torch.compile could not trace the search


def _triton_lacks(device: str) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed (pip install 'fastm2rec[triton]')"
    if torch.device(device).type == "cuda":
        if torch.compiler.is_compiling():
            return None  # an older device is refused by Triton's compiler
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"needs compute capability 8.0 or newer, and {device} has {major}.{minor}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter: for tests, and very slow
    return "Triton's kernels run on CUDA devices (elsewhere only in its interpreter, for tests: TRITON_INTERPRET=1)"


def _mamba_ssm_lacks(device: str) -> str | None:
    from ._mamba_ssm import missing

    if torch.device(device).type != "cuda":
        return "mamba-ssm's scan runs on CUDA devices only"
    return (None if torch.compiler.is_compiling() else missing()) or _triton_lacks(device)


@dataclass(frozen=True)
class _Implementation:
    """One way to compute the ops.

    Args:
        load: the functions by op; imports what it needs.
        why_not: for a device's name, None where the implementation can run on it, else the reason why it cannot.
        automatic: the kinds of device on which "auto" may take it.
    """

    load: Callable[[], dict[str, Callable[..., Any]]]
    why_not: Callable[[str], str | None]
    automatic: frozenset[str]


_OPS = frozenset(
    {
        "causal_conv1d", "cross_entropy", "embed_norm", "encode_last", "filtered_last_scan", "gated_fusion",
        "last_scan", "last_state", "output_ffn", "selective_scan", "spectral_projection", "spectral_projection_fft",
    }
)  # fmt: skip

# In the order in which "auto" tries them.
_IMPLEMENTATIONS: dict[str, _Implementation] = {
    "triton": _Implementation(_triton, _triton_lacks, frozenset({"cuda"})),
    "cpu": _Implementation(_cpu, _cpu_lacks, frozenset({"cpu"})),
    "mamba_ssm": _Implementation(_mamba_ssm, _mamba_ssm_lacks, frozenset()),  # slower, and not deterministic
    "reference": _Implementation(_reference, lambda device: None, frozenset({"cpu", "cuda"})),
}

_loaded: dict[str, dict[str, Callable[..., Any]]] = {}


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
    return _IMPLEMENTATIONS[impl].why_not(str(device))


def chosen(op: str, impl: str, device: torch.device | str) -> str:
    """The name of the implementation that runs when `impl` is asked for.

    Raises:
        ImplementationError: `impl` was asked for by name and cannot run; the message says why.
    """
    if impl == AUTO:
        kind = torch.device(device).type
        for name, entry in _IMPLEMENTATIONS.items():
            if kind in entry.automatic and unavailable(op, name, device) is None:
                return name
        return "reference"
    reason = unavailable(op, impl, device)
    if reason is not None:
        raise ImplementationError(f"impl={impl!r} was asked for {op} on {torch.device(device)}: {reason}")
    return impl


def resolve(op: str, impl: str, device: torch.device | str) -> Callable[..., Any]:
    """The function that computes `op` when `impl` is asked for on `device`.

    Raises:
        ImplementationError: as `chosen`.
    """
    name = chosen(op, impl, device)
    if torch.compiler.is_compiling():
        return _IMPLEMENTATIONS[name].load()[op]
    if name not in _loaded:
        _loaded[name] = _IMPLEMENTATIONS[name].load()
    return _loaded[name][op]


def silu_in_scan(impl: str, device: torch.device | str) -> bool:
    """Does the convolution's SiLU belong into `last_scan`, rather than behind the filter?

    A CPU applies it to the few rows that its scan holds in the cache; a GPU's filter applies it before it writes.
    """
    return chosen("last_scan", impl, device) in ("cpu", "reference")
