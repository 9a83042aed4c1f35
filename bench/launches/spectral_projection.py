"""The spectral projection's kernels: the filter alone, with the Linear, with the convolution folded in on either side,
few columns and many, and the route by fast transforms."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.launches._launch import Launch
from fastm2rec.basis import n_columns
from fastm2rec.kernels._common import Arithmetic
from fastm2rec.kernels._spectral_fused import fits
from fastm2rec.kernels.spectral_fft import spectral_projection_fft
from fastm2rec.kernels.spectral_projection import spectral_projection

BATCH, D_MODEL, D_INNER, WIDTH = 2, 64, 128, 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _room(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def _run(form: str, seqlen: int, theta: float | None, dtype: torch.dtype, backward: bool) -> None:
    out = 2 * D_INNER if form == "linear" else D_INNER
    x, weight = _room(BATCH, seqlen, D_MODEL, dtype=dtype), _room(out, D_MODEL, dtype=dtype)
    columns = n_columns(seqlen, theta, "fourier")
    basis = torch.empty(seqlen, columns)
    gain = torch.empty(columns, requires_grad=backward)
    arguments: dict[str, Any] = {}
    if form != "filter":
        arguments = {"weight": weight, "bias": _room(out, dtype=dtype)}
    if form in ("input", "inner"):
        arguments |= {
            "conv_weight": _room(out, WIDTH, dtype=dtype), "conv_bias": _room(out, dtype=dtype),
            "conv_first": form == "inner", "activation": "silu",
        }  # fmt: skip
    with torch.set_grad_enabled(backward):
        y = spectral_projection(x, basis, gain, **arguments)
    if backward:
        y.backward(torch.empty_like(y))


def _run_fft(seqlen: int, dtype: torch.dtype, project: bool, per_channel: bool, backward: bool) -> None:
    x = _room(2, seqlen, D_MODEL, dtype=dtype)
    gain = _room(seqlen // 10 + 1, *([D_MODEL] * per_channel), dtype=torch.float32)
    weight = _room(2 * D_INNER, D_MODEL, dtype=dtype) if project else None
    with torch.set_grad_enabled(backward):
        y = spectral_projection_fft(x, gain, weight)
    if backward:
        y.backward(torch.empty_like(y))


# Lengths of Amazon and ML-1M at the published theta, one row too wide for one kernel, and a soft mask with all columns.
_SPECTRA = ((50, 0.1), (200, 0.1), (200, None), (1024, 0.1))


def _dots(form: str, columns: int, dtype: torch.dtype, backward: bool) -> tuple[str, ...]:
    """The kernels that must be launched, and hold a dot."""
    convolves = form in ("input", "inner")
    held = fits(columns, WIDTH if convolves else 0, Arithmetic(torch.float32, dtype))
    transforms = ("analyse_kernel", "synthesise_kernel")
    if not held:
        return transforms
    if not backward or form == "filter":
        return ("fused_kernel",)
    return ("fused_kernel", *(transforms if convolves else ("synthesise_kernel",)))


def _cases() -> list[Launch]:
    cases = []
    for name, dtype in DTYPES.items():
        for direction in ("forward", "backward"):
            backward = direction == "backward"
            for form in ("filter", "linear", "input", "inner"):
                for seqlen, theta in _SPECTRA:
                    cases.append(
                        Launch(
                            op="spectral_projection",
                            name=f"{direction} {form} {name} L={seqlen} R={n_columns(seqlen, theta, 'fourier')}",
                            run=partial(_run, form, seqlen, theta, dtype, backward),
                            dots=_dots(form, n_columns(seqlen, theta, "fourier"), dtype, backward),
                            core=name == "bf16" and (seqlen, theta) == (200, 0.1) and form in ("linear", "inner"),
                        )
                    )
            cases += [
                Launch(
                    op="spectral_projection",
                    name=f"{direction} fft{' linear' * project}{' per channel' * per_channel} {name} L=4096",
                    run=partial(_run_fft, 4096, dtype, project, per_channel, backward),
                    dots=("bins_kernel",) if project else (),
                    core=name == "bf16" and project and not per_channel,
                )
                for project, per_channel in ((False, False), (True, False), (True, True))
            ]
    return cases


CASES = _cases()
