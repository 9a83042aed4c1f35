"""mamba-ssm's CUDA scan and causal-conv1d's CUDA convolution behind this package's op signatures.

The extension module `selective_scan_cuda` is called directly: `import mamba_ssm` would pull in transformers and more.
Its scan has no initial state and no packed sequences, and sums dB and dC with atomics, so two runs may differ in the
last bits.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .impl import ImplementationError

MODULES = {"selective_scan_cuda": "mamba-ssm", "causal_conv1d": "causal-conv1d"}


def missing() -> str | None:
    """The reason why this cannot be used here; None if both packages are there."""
    absent = [package for module, package in MODULES.items() if importlib.util.find_spec(module) is None]
    if absent:
        return f"{' and '.join(absent)} not installed (pip install 'fastm2rec[mamba]'; building them needs nvcc)"
    return None


class _Scan(torch.autograd.Function):
    """`selective_scan_cuda` for B and C (B, dstate, seqlen): the contract of `mamba_ssm.selective_scan_fn`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        import selective_scan_cuda

        *tensors, delta_softplus = arguments
        u, delta, A, B, C, D, z, delta_bias = tensors
        out, x, *rest = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        ctx.delta_softplus = delta_softplus
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, x, out)
        last = x[:, :, -1, 1::2]  # x holds, for every chunk of time, decay and state in turn
        ctx.mark_non_differentiable(last)
        return (out if z is None else rest[0]), last

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        import selective_scan_cuda

        u, delta, A, B, C, D, z, delta_bias, x, out = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, ddelta_bias, *rest = selective_scan_cuda.bwd(
            u, delta, A, B, C, D, z, delta_bias, _last_contiguous(gradients[0]), x, None if z is None else out, None,
            ctx.delta_softplus, False,
        )  # fmt: skip
        return (
            du, ddelta, dA, dB, dC, None if D is None else dD, None if z is None else rest[0],
            None if delta_bias is None else ddelta_bias, None,
        )  # fmt: skip


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `fastm2rec.reference.selective_scan.selective_scan`, in u's dtype with A, D and delta_bias in float32.

    Raises:
        ImplementationError: an initial state, packed sequences, or float64, which the CUDA scan does not have.
    """
    for name, given in (("initial_state", initial_state), ("cu_seqlens", cu_seqlens)):
        if given is not None:
            raise ImplementationError(f"impl='mamba_ssm': its scan takes no {name}; impl='triton' does")
    if u.dtype == torch.float64:
        raise ImplementationError("impl='mamba_ssm': its scan takes float32 and half precision, got float64")
    like_u = [_last_contiguous(tensor.to(u.dtype)) for tensor in (u, delta)]
    states = [_last_contiguous(tensor.to(u.dtype)).unsqueeze(1) for tensor in (B, C)]
    vectors = [None if tensor is None else tensor.float().contiguous() for tensor in (D, delta_bias)]
    gate = None if z is None else _last_contiguous(z.to(u.dtype))
    y, last = _Scan.apply(*like_u, A.float().contiguous(), *states, vectors[0], gate, vectors[1], delta_softplus)
    return (y, last) if return_last_state else y


def last_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    lengths: Tensor | None = None,
    exponentials: str = "exact",
    nodes: object = None,
    splits: int = 1,
) -> Tensor:
    """As `fastm2rec.reference.last_state.last_state`: the scan at all positions, of which one is kept.

    Later positions do not change earlier ones, so what stands in the padding does not matter.

    Raises:
        ImplementationError: as `selective_scan`, and exponentials or splits that are this package's kernels' own.
    """
    if exponentials == "nodes" or splits != 1:
        raise ImplementationError(
            f"impl='mamba_ssm': its scan has exact exponentials and no splits, got exponentials={exponentials!r} and "
            f"splits={splits}; impl='triton' has both"
        )
    everywhere = C.unsqueeze(2).expand(-1, -1, u.shape[2])
    y = selective_scan(u, delta, A, B, everywhere, D, None, delta_bias, delta_softplus)
    assert isinstance(y, Tensor)
    if lengths is None:
        last = y[:, :, -1]
    else:
        last = y.gather(2, (lengths - 1).view(-1, 1, 1).expand(-1, y.shape[1], 1)).squeeze(2)
    return last if z is None else last * F.silu(z)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """As `fastm2rec.reference.causal_conv1d.causal_conv1d`."""
    from causal_conv1d import causal_conv1d_fn

    cast = None if bias is None else bias.to(x.dtype)
    return causal_conv1d_fn(x, weight.to(x.dtype), cast, activation=activation)
