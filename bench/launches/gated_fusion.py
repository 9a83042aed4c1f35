"""The gated fusion's kernels, with every gate, at the published width and at wider ones."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import Tensor

from bench.launches._launch import Launch
from fastm2rec.kernels._gated_fusion_backward import launch_backward
from fastm2rec.kernels._gated_fusion_forward import Operands, launch_forward

BATCH, TABLE_ROWS = 4096, 12102  # the rows are Amazon Beauty's
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _operands(gate: str, dim: int, dtype: torch.dtype, *, norm: bool) -> Operands:
    """What the model passes: the table of the projected text and ids; the control has no text."""

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    text, context = gate != "none", gate == "context"
    shape = (dim,) if gate == "vector" else ()
    return Operands(
        h=room(BATCH, dim),
        text=room(TABLE_ROWS, dim) if text else None,
        ids=torch.zeros(BATCH, dtype=torch.int64) if text else None,
        alpha=room(*shape) if text and not context else None,
        beta=room(*shape) if text and not context else None,
        weight=room(dim, dim),
        bias=room(dim),
        gate_weight=room(2 * dim, 2 * dim) if context else None,
        gate_bias=room(2 * dim) if context else None,
        norm_weight=room(dim) if norm else None,
        norm_bias=room(dim) if norm else None,
    )


def _run(direction: str, gate: str, dim: int, dtype: torch.dtype, norm: bool) -> None:
    operands = _operands(gate, dim, dtype, norm=norm)
    save = direction == "backward"
    y, *saved = launch_forward(operands, residual=norm, eps=1e-12, save=save)
    if save:
        launch_backward(y, operands, *saved, residual=norm, needs_text=True)


# The published width with every gate; a wider one with the lightest and the heaviest; and one whose rows leave room for
# one chunk of W alone.
FORMS = {
    64: [("none", False), ("scalar", False), ("vector", True), ("context", False), ("context", True)],
    256: [("scalar", False), ("context", True)],
    1000: [("none", False), ("vector", True)],
}


def _cases() -> list[Launch]:
    cases = []
    for direction, dim, dtype in itertools.product(("forward", "backward"), FORMS, DTYPES):
        for gate, norm in FORMS[dim]:
            kernels = ["gated_fusion_fwd_kernel"]
            if direction == "backward":
                kernels += ["gated_fusion_bwd_rows_kernel", "gated_fusion_bwd_weights_kernel"]
                kernels += ["gated_fusion_bwd_gate_rows_kernel"] * (gate == "context")
            cases.append(
                Launch(
                    op="gated_fusion",
                    name=f"{direction} {gate} {dtype} D={dim}{' residual norm' if norm else ''}",
                    run=partial(_run, direction, gate, dim, DTYPES[dtype], norm),
                    dots=tuple(kernels),
                    core=dim == 64 and dtype == "bf16" and (gate, norm) in (("scalar", False), ("context", True)),
                )
            )
    return cases


CASES = _cases()
