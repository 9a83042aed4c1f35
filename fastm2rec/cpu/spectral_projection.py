"""`spectral_projection` with the convolution inside the matrix products: plain PyTorch, differentiable.

A depthwise convolution is a sum of shifted copies, each times a number per channel. With S_j the shift by j positions
(zeros come in at the start, what leaves at the end is lost) and w_j the tap for it:

    filter after it     V (m * V^T sum_j w_j * S_j (x W^T))  =  V (m * sum_j (S_j^T V)^T x (w_j * W)^T)
    filter before it    sum_j w_j * S_j (V (m * V^T x) W^T)  =  sum_j S_j V (m * V^T x) (w_j * W)^T

The shifted bases are one matrix of R * width columns, the scaled weights another: the convolution costs no pass over
[B, L, E], of which PyTorch's operations need several. At L = 200, 41 columns and 4 taps (64 to 128
channels, one core) that takes 0.3 of the reference's time with the filter after the convolution and 0.5 before it; 0.6
and 0.7 with a basis for each row. With more shifted columns than positions the gain is gone: there, and without a
convolution or a Linear, it is the reference.

With the Fourier basis over all slots there is less to do: the products are those of `product_kernels.py`; with the
filter last the convolution is done on the frequencies (`fourier_kernels.py`), else by the kernel of `causal_conv1d.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..basis import row_basis
from ..reference.spectral_projection import spectral_projection as reference
from .causal_conv1d import causal_conv1d
from .fourier_conv import convolved_bins
from .products import Products, contract, expand, pack

# Of each basis that was seen: its version, and its packed forms by dtype, or None if it is not Fourier's.
_fourier: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def spectral_projection(
    x: Tensor,
    basis: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    conv_first: bool = False,
    activation: str | None = None,
) -> Tensor:
    """As `fastm2rec.reference.spectral_projection.spectral_projection`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if conv_weight is not None and weight is not None:
        products = fourier_products(basis, conv_weight, dtype)
        if products is not None and conv_first:
            bins = fourier_bins(products, x, basis, mask, weight, bias, conv_weight, conv_bias)
            y = expand(bins, basis.to(dtype), products)
            return (F.silu(y) if activation == "silu" else y).to(x.dtype)
        if products is not None:
            bins = _masked(contract(x.to(dtype), basis.to(dtype), products), mask)
            h = expand(F.linear(bins, weight.to(dtype)).to(dtype), basis.to(dtype), products)
            h = h if bias is None else h + bias.to(dtype)
            return causal_conv1d(h.transpose(1, 2), conv_weight, conv_bias, activation).transpose(1, 2).to(x.dtype)
    if conv_weight is None or weight is None or conv_weight.shape[1] * basis.shape[-1] > basis.shape[-2]:
        return reference(
            x, basis, mask, weight, bias,
            conv_weight=conv_weight, conv_bias=conv_bias, conv_first=conv_first, activation=activation,
        )  # fmt: skip
    tensors = (x, basis, mask, weight, bias, conv_weight, conv_bias)
    y = (_filter_last if conv_first else _filter_first)(*(t if t is None else t.to(dtype) for t in tensors))
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def fourier_products(basis: Tensor, conv_weight: Tensor, dtype: torch.dtype) -> Products | None:
    """The basis packed, if it is Fourier's over all slots and the sizes are those that the kernels take."""
    dim, width = conv_weight.shape
    if (
        torch.compiler.is_compiling()
        or type(basis) is not Tensor
        or basis.dim() != 2
        or dim % 32
        or not 2 <= width <= len(basis) + 1
    ):
        return None
    if basis.is_inference():  # it tracks no version, so nothing is remembered of it
        return pack(basis, dtype) if _equals_fourier(basis) else None
    known = _fourier.get(basis)
    if known is None or known[0] != basis._version:
        known = _fourier[basis] = (basis._version, {} if _equals_fourier(basis) else None)
    packed: dict[torch.dtype, Products] | None = known[1]
    if packed is None:
        return None
    if dtype not in packed:
        with torch.inference_mode(False):  # what is remembered may be used for training
            packed[dtype] = pack(basis.detach(), dtype)
    return packed[dtype]


def _equals_fourier(basis: Tensor) -> bool:
    seqlen, columns = basis.shape
    exact = row_basis(torch.tensor([seqlen]), seqlen, columns, "fourier", torch.float64)[0]
    return bool((basis - exact).abs().max() <= 4 * torch.finfo(basis.dtype).eps)


def _shifted(basis: Tensor, shifts: range) -> Tensor:
    """S_j V for each j, as columns (r, j): [..., L, R] to [..., L, R * width]. A negative j looks ahead."""
    seqlen = basis.shape[-2]
    moved = []
    for j in shifts:
        missing = min(abs(j), seqlen)
        rows = basis.narrow(-2, missing if j < 0 else 0, seqlen - missing)
        moved.append(F.pad(rows, (0, 0, 0, missing) if j < 0 else (0, 0, missing, 0)))
    return torch.stack(moved, dim=-1).flatten(-2)


def _masked(bins: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bins
    # As in the reference: a square mask counts as one for each row.
    return bins * (mask.unsqueeze(-1) if mask.dim() == 1 or mask.shape == bins.shape[:2] else mask)


def fourier_bins(
    products: Products,
    x: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
) -> Tensor:
    """m * V^T conv(x W^T + b) [B, R, E], in float32 at least, for `fourier_products` of V."""
    dtype, extra = products.basis.dtype, conv_weight.shape[1] - 1
    x, basis, weight, conv_weight = (t.to(dtype) for t in (x, basis, weight, conv_weight))
    bins = F.linear(contract(x, basis, products, extra), weight)
    if bias is not None:
        bins = bins + F.pad(basis.sum(dim=0), (0, extra), value=1.0)[:, None] * bias
    bins = convolved_bins(bins.to(dtype), conv_weight, basis)  # autocast makes products half precision
    if conv_bias is not None:
        bins = bins + basis.sum(dim=0)[:, None] * conv_bias
    return _masked(bins, mask)


def _filter_last(x, basis, mask, weight, bias, conv_weight, conv_bias):
    taps = (basis.shape[-1], conv_weight.shape[1])
    bases = _shifted(basis, range(1 - taps[1], 1))  # of the oldest position first, as the taps are
    bins = (bases.mT @ x).unflatten(1, taps).flatten(2)  # [B, R, width C]
    bins = F.linear(bins, (conv_weight[:, :, None] * weight[:, None]).flatten(1))
    if bias is not None:
        bins = bins + F.linear(bases.sum(dim=-2).unflatten(-1, taps), conv_weight * bias[:, None])
    if conv_bias is not None:
        bins = bins + basis.sum(dim=-2).unsqueeze(-1) * conv_bias
    return basis @ _masked(bins, mask)


def _filter_first(x, basis, mask, weight, bias, conv_weight, conv_bias):
    width = conv_weight.shape[1]
    shifts = range(width - 1, -1, -1)
    bins = _masked(basis.mT @ x, mask)
    bins = F.linear(bins, (conv_weight.t()[:, :, None] * weight).flatten(0, 1))  # [B, R, width E]
    y = _shifted(basis, shifts) @ bins.unflatten(2, (width, -1)).flatten(1, 2)
    if bias is not None:
        seen = torch.stack([torch.arange(x.shape[1], device=x.device) >= j for j in shifts], dim=1).to(x.dtype)
        y = y + F.linear(seen, conv_weight * bias[:, None])
    return y if conv_bias is None else y + conv_bias
