"""The models that are measured, every one with its best chance, and the reasons why some cannot run here.

A `Case` is one row of a table before it has times: what runs, what checks it, or why it does not run.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastm2rec import impl
from fastm2rec.base import SequentialRecommender, build_model
from fastm2rec.config import M2RecConfig, SASRecConfig
from fastm2rec.reference.m2rec import M2Rec as ReferenceM2Rec

MODELS = ("m2rec", "mamba4rec", "sasrec", "bert4rec")
COMPILE_ORDER = ("m2rec", "sasrec", "bert4rec", "mamba4rec")  # what is compiled first when time is short
TEXT_DIM = 384

Encode = Callable[[Tensor, Tensor], Tensor]  # ids [B, L], lengths [B] to queries [B, D]


@dataclass(frozen=True)
class Sizes:
    """What all rows of a run share."""

    n_items: int
    d_state: int
    topk: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class Case:
    """One row to be.

    Args:
        model: which of `MODELS`.
        impl: what computes it.
        mode: "eager" or "compiled".
        config: its sizes.
        encode: the timed function up to the query, or None where `skipped` says why there is none.
        check: an independent computation of the same queries, from the same weights.
        table: [n_items + 1, D], what queries are scored against.
        skipped: the reason why this row has no time.
    """

    model: str
    impl: str
    mode: str
    config: M2RecConfig | SASRecConfig
    encode: Encode | None = None
    check: Encode | None = None
    table: Tensor | None = None
    skipped: str | None = None

    def top(self, k: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Ids in, the k best items out: [B, k] scores and ids; padding is never among them."""
        encode, table = self.encode, self.table
        assert encode is not None
        assert table is not None
        weight = table[1:].t()

        def run(item_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            scores, ids = (encode(item_ids, lengths) @ weight).topk(k, dim=1)
            return scores, ids + 1

        return run


def cases(names: tuple[str, ...], seqlen: int, sizes: Sizes) -> list[Case]:
    """Every row for these models at one sequence length: the eager ones, then what is compiled."""
    rows: list[Case] = []
    for name in names:
        rows += (
            _mamba_cases(name, seqlen, sizes)
            if name in ("m2rec", "mamba4rec")
            else _attention_cases(name, seqlen, sizes)
        )

    def place(case: Case) -> tuple[bool, int]:
        return case.skipped is not None, 0 if case.mode == "eager" else 1 + COMPILE_ORDER.index(case.model)

    return sorted(rows, key=place)


def _build(model_type: str, config: dict[str, Any], sizes: Sizes) -> SequentialRecommender:
    text = None
    if config.get("text_dim"):
        text = torch.randn(sizes.n_items + 1, config["text_dim"])
        text[0] = 0
    model = build_model(model_type, {"n_items": sizes.n_items, **config}, text).eval()
    with torch.no_grad():  # start values are small: with them a wrong model would hardly differ from a right one
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(sizes.device, sizes.dtype)


def _mamba_cases(name: str, seqlen: int, sizes: Sizes) -> list[Case]:
    fields: dict[str, Any] = {"max_len": seqlen, "d_state": sizes.d_state}
    fields |= {"text_dim": TEXT_DIM} if name == "m2rec" else {"filter_placement": "none", "gate": "none"}
    model = _build("m2rec", fields, sizes)
    config = model.config
    assert isinstance(config, M2RecConfig)
    specification = ReferenceM2Rec(config, model.get_buffer("text").float().cpu() if name == "m2rec" else None).eval()
    specification.load_state_dict({key: value.float().cpu() for key, value in model.state_dict().items()})

    def check(item_ids: Tensor, lengths: Tensor) -> Tensor:
        return specification(item_ids.cpu(), lengths.cpu())

    table = model.item_weight.detach()
    plain = _through(model, "reference")
    row = Case(name, "reference", "eager", config, plain.encode, check, table)
    rows = [row, _compiled(row, plain, sizes.device)]
    if name == "m2rec":
        assembled = ReferenceM2Rec(config, torch.zeros(sizes.n_items + 1, TEXT_DIM)).eval()
        assembled.load_state_dict(model.state_dict())
        assembled.to(sizes.device, sizes.dtype)
        rows.append(Case(name, "torch.fft + loop", "eager", config, assembled, check, table))
    for other in ("triton", "cpu", "mamba_ssm"):
        reason = impl.unavailable("last_scan", other, sizes.device)
        if reason is None:
            rows.append(Case(name, other, "eager", config, _through(model, other).encode, check, table))
        else:
            rows.append(Case(name, other, "eager", config, skipped=reason))
    return rows


def _through(model: SequentialRecommender, name: str) -> SequentialRecommender:
    """The same weights through another implementation."""
    twin = copy.copy(model)
    twin.impl = name  # type: ignore[assignment]
    return twin


def _attention_cases(name: str, seqlen: int, sizes: Sizes) -> list[Case]:
    model: Any = _build(name, {"max_len": seqlen}, sizes)
    exact: Any = build_model(name, model.config.to_dict()).eval()
    exact.load_state_dict({key: value.float().cpu() for key, value in model.state_dict().items()})

    def check(item_ids: Tensor, lengths: Tensor) -> Tensor:
        return exact.encode(item_ids.cpu(), lengths.cpu(), pruned=False)

    def published(item_ids: Tensor, lengths: Tensor) -> Tensor:
        return model.encode(item_ids, lengths, pruned=False)

    table = model.item_weight.detach()
    row = Case(name, "last query", "eager", model.config, model.encode, check, table)
    return [
        Case(name, "as published", "eager", model.config, published, check, table),
        row,
        _compiled(row, model, sizes.device),
    ]


def _compiled(row: Case, model: nn.Module, device: torch.device) -> Case:
    """The same row through torch.compile; on CUDA with autotuning and CUDA graphs."""
    reason = cannot_compile(device)
    if reason is not None:
        return Case(row.model, row.impl, "compiled", row.config, skipped=reason)
    mode = "max-autotune" if device.type == "cuda" else "default"
    encode = torch.compile(model, mode=mode, fullgraph=True, dynamic=False)
    return Case(row.model, row.impl, "compiled", row.config, encode, row.check, row.table)


def cannot_compile(device: torch.device) -> str | None:
    """Why torch.compile cannot run here; None if nothing speaks against it."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "torch.compile needs a C++ compiler on a CPU, and none is installed"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on CUDA, and it is not installed"
    return None
