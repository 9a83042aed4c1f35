"""The low-pass filter and the Linear behind it: 64 channels in, 256 out, theta 0.1.

The peers: torch.fft as one would write it, the same through cuFFT with CuPy, and a chain of matrix products with the
same basis, which is the algebra of the kernel without the kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import _bounds
from bench.peers import _cufft
from bench.peers._problem import INPUTS, Peer, Problem, Shape, compiled, draw, through
from fastm2rec import ops
from fastm2rec.basis import n_columns, row_basis
from fastm2rec.reference.spectral_projection import frequencies, mask_gain, spectral_filter

D_MODEL, D_OUT, THETA = 64, 256, 0.1


def problem(shape: Shape, device: torch.device, autotune: bool) -> Problem:
    """x [B, L, 64] and weight [256, 64]."""
    generator = torch.Generator(device).manual_seed(shape.seq_len)
    dtype, length = shape.torch_dtype, shape.seq_len
    weight = draw(D_OUT, D_MODEL, dtype=dtype, device=device, generator=generator) * D_MODEL**-0.5
    columns = n_columns(length, THETA, "fourier")
    basis = row_basis(torch.tensor([length]), length, columns, "fourier", torch.float32)[0].to(device)
    kept = mask_gain(frequencies(length), THETA)
    gain = kept[: int(kept.sum())].to(device, torch.float32)
    bins = kept.to(device, torch.float32)

    def by_basis(x: Tensor, weight: Tensor, *, impl: str) -> Tensor:
        return ops.spectral_projection(x, basis, None, weight, impl=impl)

    def by_transforms(x: Tensor, weight: Tensor, *, impl: str) -> Tensor:
        return ops.spectral_projection_fft(x, gain, weight, impl=impl)

    def by_torch_fft(x: Tensor, weight: Tensor) -> Tensor:
        # Half precision has no transform of every length.
        filtered = torch.fft.irfft(torch.fft.rfft(x.float(), dim=1) * bins[:, None], n=length, dim=1)
        return F.linear(filtered.to(x.dtype), weight)

    narrow = basis.to(dtype)

    def by_products(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(narrow @ (narrow.mT @ x), weight)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(spectral_filter(x, THETA), weight)

    fft, products = Peer("torch.fft", "eager", by_torch_fft), Peer("matrix products", "eager", by_products)
    peers = [
        through("spectral_projection", "triton", by_basis, device),
        _renamed(through("spectral_projection_fft", "triton", by_transforms, device), "triton, transforms"),
        through("spectral_projection", "cpu", by_basis, device),
        fft,
        *compiled(fft, device, autotune),
        products,
        *compiled(products, device, autotune),
        *_cufft.peers(shape, device, int(kept.sum())),
    ]
    return Problem(
        what=f"{D_MODEL} -> {D_OUT}, R={columns}",
        inputs=[
            (draw(shape.batch, length, D_MODEL, dtype=dtype, device=device, generator=generator), weight)
            for _ in range(INPUTS)
        ],
        batched=(True, False),
        learned=(True, True),
        reference=reference,
        peers=peers,
        work=_work(shape, columns),
    )


def _renamed(peer: Peer, name: str) -> Peer:
    return Peer(name, peer.mode, peer.run, peer.skipped)


def _work(shape: Shape, columns: int) -> _bounds.Work:
    """Read x and W once, write y once; the cheaper of filtering before the Linear and of a Linear on the columns.

    The backward pass reads dy and x, writes dx and dW, and does each product twice: once for x, once for W.
    """
    rows, training = shape.batch * shape.seq_len, shape.phase == "training"
    down_and_up = 2 * columns * (D_MODEL + D_MODEL) * rows + 2 * D_MODEL * D_OUT * rows
    on_columns = 2 * columns * (D_MODEL + D_OUT) * rows + 2 * D_MODEL * D_OUT * columns * shape.batch
    numbers = rows * (D_MODEL + D_OUT) + D_MODEL * D_OUT
    if training:
        numbers = 2 * numbers + rows * D_MODEL
    return _bounds.Work(
        special=0.0,
        operations=float(min(down_and_up, on_columns) * (3 if training else 1)),
        bytes=float(shape.torch_dtype.itemsize * numbers),
    )
