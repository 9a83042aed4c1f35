"""Kernels that keep to the gates or break one of them each, as `bench/resources.py` would find them.

Run as a script, in a process without TRITON_INTERPRET, it is that command line over these launches.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

from bench import resources
from bench.launches._launch import Launch

BLOCK, ROWS = 8192, 64


@triton.jit
def exponentials_kernel(x_ptr, y_ptr, seqlen, BLOCK: tl.constexpr):
    """One exponential per element in a loop; before it a loop that has none, after it code that has more."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for t in range(seqlen):
        total += tl.load(x_ptr + t * BLOCK + offs)
    for t in range(seqlen):
        total = tl.exp2(total + tl.load(x_ptr + t * BLOCK + offs))
    tl.store(y_ptr + offs, tl.exp2(tl.exp2(tl.exp2(total))))


@triton.jit
def sum_kernel(x_ptr, y_ptr, seqlen, BLOCK: tl.constexpr):
    """A sum over all lanes in every iteration."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    for _ in range(seqlen):
        x = x * x + tl.sum(x, axis=0)
    tl.store(y_ptr + offs, x)


@triton.jit
def spilling_kernel(x_ptr, y_ptr, seqlen, ROWS: tl.constexpr):
    """Carries more values through a loop than it is given registers."""
    offs_m, offs_n = tl.arange(0, ROWS), tl.arange(0, ROWS)
    offs = offs_m[:, None] * ROWS + offs_n[None, :]
    total = tl.load(x_ptr + offs)
    for _ in range(seqlen):
        total = total * total + tl.sum(total, axis=1)[:, None]
    tl.store(y_ptr + offs, total)


@triton.jit
def product_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """x x, on tensor cores unless it must be as precise as float32."""
    offs_m, offs_n = tl.arange(0, ROWS), tl.arange(0, ROWS)
    x = tl.load(x_ptr + offs_m[:, None] * ROWS + offs_n[None, :])
    tl.store(y_ptr + offs_m[:, None] * ROWS + offs_n[None, :], tl.dot(x, x, input_precision=PRECISION))


@triton.jit
def transposing_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    """Changes the order of a tile in shared memory, which must hold all of it."""
    offs_m, offs_n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + offs_m[:, None] * N + offs_n[None, :])
    tl.store(y_ptr + offs_n[:, None] * M + offs_m[None, :], tl.trans(x))


@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 0, "this kernel never compiles")


def exponentials() -> None:
    exponentials_kernel[(1,)](torch.empty(7, BLOCK), torch.empty(BLOCK), 7, BLOCK=BLOCK, num_warps=4)


def sums() -> None:
    sum_kernel[(1,)](torch.empty(1024), torch.empty(1024), 7, BLOCK=1024, num_warps=1)


def spilling() -> None:
    x = torch.empty(ROWS, ROWS)
    spilling_kernel[(1,)](x, torch.empty_like(x), 7, ROWS=ROWS, num_warps=1, maxnreg=64)


def product(precision: str) -> None:
    x = torch.empty(16, 16)
    product_kernel[(1,)](x, torch.empty_like(x), ROWS=16, PRECISION=precision, num_warps=4)


def transposing() -> None:
    x = torch.empty(256, 256)
    transposing_kernel[(1,)](x, torch.empty_like(x), M=256, N=256, num_warps=32)


def both_products() -> None:
    product("tf32")
    product("ieee")
    product("tf32")


EXPONENTIALS, PRODUCT, SUM = exponentials_kernel.__name__, product_kernel.__name__, sum_kernel.__name__

CASES = [
    Launch("toy", "exponentials", exponentials, mufu={EXPONENTIALS: (1.0, BLOCK)}),
    Launch("toy", "too many exponentials", exponentials, mufu={EXPONENTIALS: (0.9, BLOCK)}),
    Launch("toy", "shuffles", sums, shuffles={SUM: (0.16, 1024)}),
    Launch("toy", "too many shuffles", sums, shuffles={SUM: (0.15, 1024)}),
    Launch("toy", "spilling", spilling),
    Launch("toy", "dot", lambda: product("tf32"), dots=(PRODUCT,)),
    Launch("toy", "no dot where one is meant", lambda: product("ieee"), dots=(PRODUCT,)),
    Launch("toy", "two specialisations", both_products),
    Launch("toy", "too much shared memory", transposing),
    Launch("toy", "not launched", lambda: product("tf32"), dots=("other_kernel",)),
    Launch("toy", "nothing", lambda: None),
    Launch("toy", "does not compile", lambda: broken_kernel[(1,)](torch.empty(1), BLOCK=1)),
]

if __name__ == "__main__":
    sys.exit(resources.main(launches=CASES))
