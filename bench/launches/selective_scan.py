"""The selective scan as the model calls it, channels side by side, and in the forms that compile to other code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench._gates import MUFU_EXACT, SHUFFLES
from bench.launches._launch import Launch
from fastm2rec.kernels._selective_scan_backward import backward
from fastm2rec.kernels._selective_scan_forward import BLOCK_D, STEPS, block_states, forward

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _case(
    dtype: str,
    dstate: int,
    seqlen: int = 200,
    dim: int = 128,
    training: bool = True,
    packed: bool = False,
    bare: bool = False,
) -> Launch:
    """One launch; `packed` has initial and last states too, `bare` no D, z, bias and softplus."""

    def run() -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=DTYPES[dtype])

        batch = 1 if packed else 2
        u, delta = (zeros(batch, seqlen, dim).transpose(1, 2) for _ in range(2))
        z = zeros(batch, seqlen, 2 * dim)[..., dim:].transpose(1, 2)
        B, C = zeros(batch, seqlen, 4 + 2 * dstate)[..., 4:].transpose(1, 2).chunk(2, dim=1)
        D, bias = torch.zeros(dim), torch.zeros(dim)
        cu_seqlens = torch.tensor([0, seqlen // 3, seqlen]) if packed else None
        arguments: dict[str, Any] = {
            "u": u, "delta": delta, "A": torch.zeros(dim, dstate), "B": B, "C": C, "D": None if bare else D,
            "z": None if bare else z, "delta_bias": None if bare else bias, "delta_softplus": not bare,
            "initial_state": torch.zeros(2, dim, dstate) if packed else None, "cu_seqlens": cu_seqlens,
        }  # fmt: skip
        y, last_state, checkpoints = forward(**arguments, save_last_state=packed, save_checkpoints=training)
        if training:
            backward(**arguments, checkpoints=checkpoints, dy=y, dlast_state=last_state if packed else None)

    elements = STEPS * BLOCK_D * block_states(dstate)
    form = f"{' packed' if packed else ''}{' bare' if bare else ''}{f' dim={dim}' if dim != 128 else ''}"
    return Launch(
        "selective_scan",
        f"{'training' if training else 'inference'} {dtype} N={dstate} L={seqlen}{form}",
        run,
        # With fewer states, softplus and SiLU show.
        mufu={"_forward_kernel": (MUFU_EXACT, elements)} if dstate >= 16 else {},
        shuffles={"_forward_kernel": (SHUFFLES, elements)},
        core=training and dtype == "bf16" and dstate in (16, 32) and not (form or seqlen != 200),
    )


def _cases() -> Iterator[Launch]:
    for dtype in DTYPES:
        for dstate in (16, 32):
            yield _case(dtype, dstate, training=False)
            yield _case(dtype, dstate)
            yield _case(dtype, dstate, packed=True)
            yield _case(dtype, dstate, dim=100)
        yield _case(dtype, 16, bare=True)
        for dstate in (3, 8, 64, 128, 256):
            yield _case(dtype, dstate)
    for dstate in (3, 8, 64, 256):
        yield _case("bf16", dstate, dim=100)
    for dstate in (16, 32):
        for seqlen in (50, 1024):
            yield _case("bf16", dstate, seqlen)


CASES = list(_cases())
