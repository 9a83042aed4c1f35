"""What a model must at least do, and how fast this device does such things: the bound that a time is held against.

Counted per sequence, with D = d_model, E = 2 D, N = d_state, J = d_conv, R basis columns, V = n_items, r = dt_rank. A
multiplication with its addition is two operations. Inference needs the last position's output only:

* M2Rec and Mamba4Rec: at every position the x half of in_proj (2 D E; a folded model looks it up), the convolution
  (2 J E), the filter there and back (4 R E, inner placement), the step size and B (2 E (r + N) + 2 r E), SiLU and
  softplus (3 E special functions) and the closed form of the last state: E N exponentials and 4 E N operations, or with
  K separable nodes 2 E exponentials, the rest being squares and products (2 E K N operations). At the last position
  the rest. A stride of s scans one position of s. The CPU engine leaves out states that have decayed to nothing; how
  many there are depends on weights and data, so none of the work for states is counted for it.
* SASRec and BERT4Rec, last query only: the first layer at every position (24 D^2, attention 4 D times the positions
  seen), the keys and values of the second (4 D^2), and the last query. A loss at all positions needs both layers whole.
* Scoring: 2 D V for each query, and the item table is read once per batch.

A training step does every product three times (y = x W, dx = dy W^T, dW = x^T dy), takes V exponentials for the softmax
of each query, and Adam reads weight, gradient and both moments and writes all but the gradient, which the backward
pass wrote: 8 words a parameter. Special functions are counted once: a backward pass may keep them. One that takes them
again, to save memory, does twice the work of this bound.

The ceilings are measured in the same process; on a CPU that of half precision is float32's where that is faster. The
bound is the largest of the four times, so what cannot overlap is counted as if it could.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastm2rec.basis import n_columns
from fastm2rec.config import M2RecConfig, SASRecConfig

LEAST_TRIES, TRY_SECONDS = 12, 0.3
DT_SPECIAL = 3  # softplus is an exponential and a logarithm, SiLU an exponential
NODE_SPECIAL = 2  # the first two powers; the others are squares of them
ADAM_WORDS, WORD = 8, 4  # parameters are float32 in training


@dataclass(frozen=True)
class Work:
    """Per batch."""

    special: float  # exponentials and logarithms
    operations: float  # additions and multiplications
    bytes: float  # read from or written to memory
    launches: int = 1  # no call is less than one kernel


@dataclass(frozen=True)
class Ceilings:
    """Per second, as measured; `launch_s` is the time of one launch."""

    special: float
    operations: float
    bytes: float
    launch_s: float = 0.0

    def bound(self, work: Work) -> tuple[str, float]:
        """Which resource bounds `work`, and the time it needs, in milliseconds."""
        times = {
            "special functions": work.special / self.special,
            "arithmetic": work.operations / self.operations,
            "memory": work.bytes / self.bytes,
            "launch": work.launches * self.launch_s,
        }
        name = max(times, key=lambda key: times[key])
        return name, times[name] * 1e3


def inference(
    config: M2RecConfig | SASRecConfig,
    batch: int,
    seqlen: int,
    itemsize: int,
    *,
    folded: bool = False,
    nodes: int = 0,
    forgets: bool = False,
) -> Work:
    """The least that next-item inference of a batch takes, ids in, scores out.

    Args:
        config: the model's sizes.
        batch, seqlen: the shape.
        itemsize: bytes of a number in the item table and the scores.
        folded: the embedded items' projections are looked up.
        nodes: K of the separable exponentials; 0 for exact ones.
        forgets: states that have decayed are left out.
    """
    special, operations = _encoder(config, seqlen, folded, nodes, forgets, everywhere=False)
    d, items = config.d_model, config.n_items
    moved = itemsize * (items * d + batch * items) + 8 * batch * seqlen
    return Work(batch * special, batch * (operations + 2 * d * items), moved)


def training(
    config: M2RecConfig | SASRecConfig,
    batch: int,
    seqlen: int,
    *,
    queries: int,
    everywhere: bool,
    parameters: int,
    forgets: bool = False,
) -> Work:
    """The least that a training step of a batch takes: forward, backward, Adam.

    Args:
        config: the model's sizes.
        batch, seqlen: the shape.
        queries: positions of a sequence at which the loss is.
        everywhere: the last layer is computed at every position.
        parameters: how many numbers Adam updates.
        forgets: as `inference`.
    """
    special, operations = _encoder(config, seqlen, False, 0, forgets, everywhere)
    scoring = 2 * config.d_model * config.n_items * queries
    moved = ADAM_WORDS * WORD * parameters + 8 * batch * seqlen
    return Work(batch * (special + queries * config.n_items), 3 * batch * (operations + scoring), moved)


def _encoder(
    config: M2RecConfig | SASRecConfig, seqlen: int, folded: bool, nodes: int, forgets: bool, everywhere: bool
) -> tuple[float, float]:
    """Special functions and operations from ids to queries, per sequence."""
    d = config.d_model
    if isinstance(config, M2RecConfig):
        e, n, rank = config.d_inner, config.d_state, config.resolved_dt_rank
        filtered = config.filter_placement != "none"
        columns = n_columns(seqlen, config.theta if config.mask == "hard" else None, config.basis) if filtered else 0
        scanned = seqlen / config.stride
        # A channel's work at a position for its states: exponentials, and operations.
        exponentials, sums = (0, 0) if forgets else (NODE_SPECIAL, 2 * nodes * n) if nodes else (n, 4 * n)
        special: float = scanned * e * (exponentials + DT_SPECIAL)
        operations: float = seqlen * e * (2 * config.d_conv + 4 * columns + (0 if folded else 2 * d))
        operations += scanned * e * (2 * (rank + n) + 2 * rank + sums)
        return special, operations + 2 * e * ((0 if folded else d) + d + n) + 4 * config.ffn_mult * d * d
    seen = seqlen / 2 if type(config) is SASRecConfig else seqlen
    layers = config.n_layers if everywhere else config.n_layers - 1
    operations = layers * seqlen * (24 * d * d + 4 * d * seen)
    special = layers * seqlen * (config.n_heads * seen + 4 * d)
    if not everywhere:
        operations += 4 * d * d * seqlen + 20 * d * d + 4 * d * seqlen
    return special, operations


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The device's rates, best of many tries: a bound must not be beaten because something else ran meanwhile."""
    if device.type == "cuda":
        from . import _ceilings  # needs triton

        rates = _ceilings.measure(device, dtype)
        return Ceilings(rates.special, rates.operations, rates.bytes, rates.launch_s)
    x = torch.rand(1 << 17)
    out = torch.empty_like(x)
    size = 512
    # A processor that emulates products in half precision takes many times as long for them: there what asks for half
    # precision may as well compute in single.
    pairs = [[torch.rand(size, size, dtype=kind) for _ in range(2)] for kind in {dtype, torch.float32}]
    # With its copy about a last-level cache, where most of what is measured on a CPU stays: memory itself is slower, so
    # that this bound may be far below what is possible, but is not beaten.
    big = torch.empty(1 << 24, dtype=torch.uint8)
    target = torch.empty_like(big)
    one = torch.zeros(1)
    return Ceilings(
        special=x.numel() / min(_best(lambda: torch.exp(x, out=out)), _best(lambda: torch.exp2(x, out=out))),
        operations=2 * size**3 / min(_best(functools.partial(torch.matmul, *pair)) for pair in pairs),
        bytes=2 * big.numel() / _best(lambda: target.copy_(big)),
        launch_s=_best(lambda: one.add_(1), threads=1),
    )


def _best(call: Callable[[], object], threads: int | None = None) -> float:
    """Seconds of the fastest call: on the clock, or what each of its threads worked where that is less."""
    threads = torch.get_num_threads() if threads is None else threads
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < LEAST_TRIES or time.perf_counter() - begun < TRY_SECONDS:
        start, processor = time.perf_counter(), time.process_time()
        call()
        worked = time.process_time() - processor
        times.append(min(time.perf_counter() - start, worked / threads))
    return min(times)
