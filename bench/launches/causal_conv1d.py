"""The causal convolution, forward and backward, at the model's sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.launches._launch import Launch
from fastm2rec.kernels.causal_conv1d import launch_backward, launch_forward

BATCH, SEQLEN, D_INNER, WIDTH = 2, 200, 128, 4


def _cases(dtype: torch.dtype, word: str) -> list[Launch]:
    x = torch.empty(BATCH, SEQLEN, D_INNER, dtype=dtype).transpose(1, 2)
    weight, bias = torch.empty(D_INNER, WIDTH), torch.empty(D_INNER)
    runs: dict[str, Callable[[], object]] = {
        "forward": partial(launch_forward, x, weight, bias, True),
        "backward": partial(launch_backward, x, x, weight, bias, True),
    }
    return [
        Launch("causal_conv1d", f"{direction} {word} E={D_INNER} silu", run, core=word == "bf16")
        for direction, run in runs.items()
    ]


CASES = _cases(torch.bfloat16, "bf16") + _cases(torch.float32, "fp32")
