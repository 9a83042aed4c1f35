"""What a model must at least do, and how fast this device does such things: the bound that a time is held against.

Counted per sequence for next-item inference (only the last position's output), D = d_model, E = 2 D, N = d_state,
J = d_conv, R basis columns, V = n_items. A multiplication with its addition is two operations.

* M2Rec and Mamba4Rec: at every position the x half of in_proj (2 D E), the convolution (2 J E), the filter there and
  back (4 R E, inner placement), the step size and B (2 E (r + N) + 2 r E), SiLU and softplus (3 E special functions)
  and the closed form of the last state (E N exponentials, 4 E N operations); at the last position the rest.
* SASRec and BERT4Rec, last query only: the first layer at every position (24 D^2, attention 4 D times the positions
  seen), the keys and values of the second (4 D^2), and the last query.
* Scoring: 2 D V, and the item table is read once per batch.

The ceilings are measured in the same process: an exponential over a tensor that fits the cache, a matrix product, a
copy. The bound is the largest of the three times, so what cannot overlap is counted as if it could.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fastm2rec.basis import n_columns
from fastm2rec.config import M2RecConfig, SASRecConfig

LEAST_TRIES, TRY_SECONDS = 12, 0.3
DT_SPECIAL = 3  # softplus is an exponential and a logarithm, SiLU an exponential


@dataclass(frozen=True)
class Work:
    """Per batch."""

    special: float  # exponentials and logarithms
    operations: float  # additions and multiplications
    bytes: float  # read from or written to memory


@dataclass(frozen=True)
class Ceilings:
    """Per second, as measured."""

    special: float
    operations: float
    bytes: float

    def bound(self, work: Work) -> tuple[str, float]:
        """Which resource bounds `work`, and the time it needs, in milliseconds."""
        times = {
            "special functions": work.special / self.special,
            "arithmetic": work.operations / self.operations,
            "memory": work.bytes / self.bytes,
        }
        name = max(times, key=lambda key: times[key])
        return name, times[name] * 1e3


def work(config: M2RecConfig | SASRecConfig, batch: int, seqlen: int, itemsize: int) -> Work:
    """The least that next-item inference of a batch takes, ids in, scores out."""
    d, items = config.d_model, config.n_items
    if isinstance(config, M2RecConfig):
        e, n, rank = config.d_inner, config.d_state, config.resolved_dt_rank
        filtered = config.filter_placement != "none"
        columns = n_columns(seqlen, config.theta if config.mask == "hard" else None, config.basis) if filtered else 0
        special: float = seqlen * e * (n / config.stride + DT_SPECIAL)
        operations: float = seqlen * e * (2 * d + 2 * config.d_conv + 4 * columns + 2 * (rank + n) + 2 * rank + 4 * n)
        operations += 2 * e * (2 * d + n) + 4 * config.ffn_mult * d * d
    else:
        seen = seqlen / 2 if type(config) is SASRecConfig else seqlen
        full = seqlen * (24 * d * d + 4 * d * seen)
        operations = (config.n_layers - 1) * full + 4 * d * d * seqlen + 20 * d * d + 4 * d * seqlen
        special = (config.n_layers - 1) * seqlen * (config.n_heads * seen + 4 * d)
    operations += 2 * d * items
    moved = itemsize * (items * d + batch * items) + 8 * batch * seqlen
    return Work(batch * special, batch * operations, moved)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The device's rates, best of many tries: a bound must not be beaten because something else ran meanwhile."""
    cpu = device.type == "cpu"
    x = torch.rand(1 << (17 if cpu else 26), device=device, dtype=torch.float32)
    out = torch.empty_like(x)
    size = 768 if cpu else 8192
    a, b = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    big = torch.empty(1 << (25 if cpu else 29), device=device, dtype=torch.uint8)
    target = torch.empty_like(big)
    return Ceilings(
        special=x.numel() / _best(lambda: torch.exp(x, out=out), device),
        operations=2 * size**3 / _best(lambda: a @ b, device),
        bytes=2 * big.numel() / _best(lambda: target.copy_(big), device),
    )


def _best(call: object, device: torch.device) -> float:
    assert callable(call)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < LEAST_TRIES or time.perf_counter() - begun < TRY_SECONDS:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
