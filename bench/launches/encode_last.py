"""Ids to query vectors as a folded model calls it: both placements and none, exact and with nodes, short and long."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from bench._gates import MUFU_EXACT, MUFU_NODES
from bench.launches._launch import Launch
from fastm2rec import M2Rec, M2RecConfig
from fastm2rec.folded import Folded, fold
from fastm2rec.kernels._nodes import fit_nodes
from fastm2rec.kernels.encode_last import BLOCK_T, encode_last

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH, N_ITEMS, TEXT_DIM, D_MODEL, D_INNER = 2, 8, 4, 64, 128
SCAN, HEAD = "encode_last_scan_kernel", "encode_last_head_kernel"


@functools.cache
def _folded(max_len: int, d_state: int, fields: tuple[tuple[str, Any], ...]) -> Folded:
    config = M2RecConfig(
        n_items=N_ITEMS, max_len=max_len, d_state=d_state, d_model=D_MODEL, **{"text_dim": TEXT_DIM, **dict(fields)}
    )
    text = torch.zeros(N_ITEMS + 1, TEXT_DIM) if config.uses_text else None
    return fold(M2Rec(config, text))


def _run(
    dtype: torch.dtype,
    max_len: int,
    d_state: int,
    fields: tuple[tuple[str, Any], ...],
    nodes: bool,
    splits: int,
    wide: bool,
) -> None:
    folded = _folded(max_len, d_state, fields).to(dtype=dtype)
    if wide:  # rates from 1 to 100 take 16 nodes, the usual ones 10 or 12
        rates = torch.logspace(0, 2, d_state).repeat(folded.A.shape[1], 1)
        folded = dataclasses.replace(folded, nodes=fit_nodes(-rates, tolerance=1.0))
    item_ids = torch.ones(BATCH, max_len, dtype=torch.int64)
    lengths = torch.full((BATCH,), max_len)
    encode_last(
        item_ids, lengths, dataclasses.replace(folded, exponentials="nodes" if nodes else "exact", splits=splits)
    )


def _case(
    name: str,
    d_state: int,
    max_len: int,
    nodes: bool = False,
    *,
    splits: int = 1,
    wide: bool = False,
    core: bool = False,
    **fields: Any,
) -> Launch:
    words = [name, f"N={d_state}", f"L={max_len}"]
    words += ["nodes"] * nodes + [f"splits={splits}"] * (splits > 1)
    words += ["wide"] * wide + [f"{key}={value}" for key, value in fields.items()]
    run = functools.partial(_run, DTYPES[name], max_len, d_state, tuple(fields.items()), nodes, splits, wide)
    elements = BLOCK_T * D_INNER * d_state
    return Launch(
        "encode_last",
        " ".join(words),
        run,
        dots=(SCAN, HEAD),
        mufu={SCAN: (MUFU_NODES if nodes else MUFU_EXACT, elements)},
        core=core,
    )


CASES = [
    *(
        # Of float32, 16 states are the closest to a spill.
        _case(name, d_state, max_len, core=max_len == 200 and (name == "bf16" or (name, d_state) == ("fp32", 16)))
        for name in DTYPES
        for d_state in (16, 32)
        for max_len in (50, 200)
    ),
    *(_case("bf16", d_state, max_len, nodes=True) for d_state in (16, 32) for max_len in (50, 200)),
    *(_case(name, 32, 1024) for name in DTYPES),  # u goes through memory
    *(_case("bf16", d_state, 1024, nodes=True) for d_state in (16, 32)),
    *(_case(name, 16, 1024, filter_placement="input") for name in DTYPES),
    *(_case(name, 32, 50, filter_placement="input", gate="context") for name in DTYPES),
    *(_case(name, 32, 200, filter_placement="input") for name in DTYPES),
    *(_case(name, 32, 200, filter_placement="none", gate="none") for name in DTYPES),
    _case("bf16", 32, 200, nodes=True, filter_placement="none", gate="none"),
    *(_case(name, 32, 200, spectrum="valid", stride=2, scan_norm=True) for name in DTYPES),
    *(_case("bf16", 32, 200, nodes, splits=8) for nodes in (False, True)),
    *(_case("bf16", d_state, 200, nodes=True, wide=True) for d_state in (16, 32)),
    _case("bf16", 64, 200),
]
