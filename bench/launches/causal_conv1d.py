"""The causal convolution, forward and backward, at the model's sizes."""

from __future__ import annotations

from functools import partial

import torch

from bench.launches._launch import Launch
from fastm2rec.kernels.causal_conv1d import launch_backward, launch_forward

BATCH, SEQLEN, D_INNER, WIDTH = 2, 200, 128, 4


def _cases(dtype: torch.dtype, word: str) -> list[Launch]:
    x = torch.empty(BATCH, SEQLEN, D_INNER, dtype=dtype).transpose(1, 2)
    weight, bias = torch.empty(D_INNER, WIDTH), torch.empty(D_INNER)
    return [
        Launch("causal_conv1d", f"forward {word} E={D_INNER} silu", partial(launch_forward, x, weight, bias, True)),
        Launch(
            "causal_conv1d", f"backward {word} E={D_INNER} silu", partial(launch_backward, x, x, weight, bias, True)
        ),
    ]


CASES = _cases(torch.bfloat16, "bf16") + _cases(torch.float32, "fp32")
