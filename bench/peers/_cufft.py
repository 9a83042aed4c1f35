"""The filter through cuFFT as CuPy calls it: plain, and with the steps around the transforms inside them as callbacks.

cuFFT compiles a callback into its kernels. The forward transform's load takes x [B, L, C] where it lies, in its own
dtype; the inverse transform's load applies the mask, and its store writes [B, L, C] in x's dtype. The Linear behind is
a matrix product of torch, as in every other peer. Forward only: CuPy's transforms have no gradient.
"""

from __future__ import annotations

import importlib.util
import string
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers._problem import Peer, Shape

PLAIN, CALLBACKS = "cuFFT (CuPy)", "cuFFT (CuPy), callbacks"

LOAD_INPUT = """
#include <cufftXt.h>
__device__ cufftReal load_input(void*, unsigned long long offset, void* info, void*) {
    const unsigned long long row = offset / $length, t = offset % $length, b = row / $channels, c = row % $channels;
    const $number number = static_cast<const $number*>(info)[(b * $length + t) * $channels + c];
    return $widened;
}
"""
LOAD_BINS = """
#include <cufftXt.h>
__device__ cufftComplex load_bins(void* data, unsigned long long offset, void*, void*) {
    return offset % $bins < $kept ? static_cast<cufftComplex*>(data)[offset] : cufftComplex{0.f, 0.f};
}
"""
STORE_OUTPUT = """
#include <cufftXt.h>
__device__ void store_output(void*, unsigned long long offset, cufftReal value, void* info, void*) {
    const unsigned long long row = offset / $length, t = offset % $length, b = row / $channels, c = row % $channels;
    const float scaled = value / $length;
    const unsigned bits = __float_as_uint(scaled);
    static_cast<$number*>(info)[(b * $length + t) * $channels + c] = $narrowed;
}
"""
# bfloat16 by hand, rounded to the nearest even: one header less to be found by the run-time compiler.
NUMBERS = {
    "float32": {"number": "float", "widened": "number", "narrowed": "scaled"},
    "bfloat16": {
        "number": "unsigned short",
        "widened": "__uint_as_float(static_cast<unsigned>(number) << 16)",
        "narrowed": "static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)",
    },
}


def peers(shape: Shape, device: torch.device, kept: int) -> list[Peer]:
    """Both, or why they do not run here; `kept` is how many bins the mask lets through."""
    reason = None
    if device.type != "cuda":
        reason = "cuFFT runs on CUDA devices only"
    elif shape.phase == "training":
        reason = "CuPy's transforms have no gradient"
    elif importlib.util.find_spec("cupy") is None:
        reason = "CuPy is not installed (pip install 'fastm2rec[cuda13]')"
    if reason is not None:
        return [Peer(name, "eager", None, reason, foreign=True) for name in (PLAIN, CALLBACKS)]

    length = shape.seq_len
    buffers: dict[str, Any] = {}

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        import cupy
        from cupyx.scipy import fft

        if not buffers:  # the mask, with the inverse transform's factor: no pass of its own
            buffers["gain"] = (cupy.arange(length // 2 + 1) < kept).astype(cupy.float32) / length
        bins = fft.rfft(cupy.from_dlpack(x.mT.float().contiguous()), axis=2)
        bins *= buffers["gain"]
        filtered = fft.irfft(bins, n=length, axis=2, norm="forward", overwrite_x=True)
        return F.linear(torch.from_dlpack(filtered).mT.to(x.dtype), weight)

    filter_by_callbacks = _Callbacks(shape, kept)

    def callbacks(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(filter_by_callbacks(x), weight)

    return [Peer(PLAIN, "eager", plain, foreign=True), Peer(CALLBACKS, "eager", callbacks, foreign=True)]


class _Callbacks:
    """The filter of [B, L, C] as two transforms and nothing else.

    CuPy keeps a plan for each pair of pointers that callbacks are given, so the output is one buffer for all calls.
    """

    def __init__(self, shape: Shape, kept: int) -> None:
        self._shape = shape
        self._kept = kept
        self._code: list[str] = []
        self._y: Tensor | None = None
        self._untouched: Any = None  # read by nobody: cuFFT wants its shape

    def __call__(self, x: Tensor) -> Tensor:
        import cupy
        from cupyx.scipy import fft

        batch, length, channels = x.shape
        if self._y is None:
            self._code = sources(self._shape, channels, self._kept)
            self._y = torch.empty_like(x)
            self._untouched = cupy.empty((batch * channels, length), dtype=cupy.float32)
        load_input, load_bins, store_output = self._code
        callbacks: Any = cupy.fft.config.set_cufft_callbacks
        with callbacks(cb_load=load_input, cb_load_name="load_input", cb_load_data=_memory(x), cb_ver="jit"):
            bins = fft.rfft(self._untouched, axis=1)
        with callbacks(
            cb_load=load_bins, cb_load_name="load_bins", cb_store=store_output, cb_store_name="store_output",
            cb_store_data=_memory(self._y), cb_ver="jit",
        ):  # fmt: skip
            fft.irfft(bins, n=length, axis=1, norm="forward", overwrite_x=True)
        return self._y


def sources(shape: Shape, channels: int, kept: int) -> list[str]:
    """The three callbacks, for these sizes."""
    numbers = {"length": shape.seq_len, "bins": shape.seq_len // 2 + 1, "channels": channels, "kept": kept}
    words = {name: f"{value}ull" for name, value in numbers.items()} | NUMBERS[shape.dtype]
    return [string.Template(code).substitute(words) for code in (LOAD_INPUT, LOAD_BINS, STORE_OUTPUT)]


def _memory(x: Tensor) -> Any:
    """The tensor's memory as CuPy names it."""
    import cupy

    owned = cupy.cuda.UnownedMemory(x.data_ptr(), x.numel() * x.element_size(), x)
    return cupy.cuda.MemoryPointer(owned, 0)
