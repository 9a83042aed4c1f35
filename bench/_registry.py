"""The models that are measured at inference, every one with its best chance, and why some cannot run here.

A `Case` is one row of a table before it has times: what runs, what checks it, or why it does not run.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastm2rec import impl
from fastm2rec.base import SequentialRecommender, build_model
from fastm2rec.config import M2RecConfig, SASRecConfig
from fastm2rec.folded import FoldedM2Rec
from fastm2rec.kernels._nodes import accepted
from fastm2rec.model import M2Rec
from fastm2rec.reference.m2rec import M2Rec as ReferenceM2Rec

from . import _assembled, _modes

MODELS = ("m2rec", "mamba4rec", "sasrec", "bert4rec")
# What is compiled first when time is short: the peer that all ratios are against.
COMPILE_ORDER = ("sasrec", "m2rec", "bert4rec", "mamba4rec")
TEXT_DIM = 384
SPLIT_POSITIONS = 16  # a program's tile: fewer positions would leave it part empty

Encode = Callable[[Tensor, Tensor], Tensor]  # ids [B, L], lengths [B] to queries [B, D]
Answer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Sizes:
    """What all rows of a shape share."""

    n_items: int
    d_state: int
    topk: int
    dtype: torch.dtype
    device: torch.device
    text_dim: int = TEXT_DIM
    search: bool = True  # torch.compile may search among kernels, for minutes
    graphs: bool = True  # CUDA graphs, torch.compile's too: they hold their memory, so none where memory is measured


@dataclass
class Case:
    """One row to be.

    Args:
        model: which of `MODELS`.
        impl: what computes it.
        mode: "eager", "compiled", `_modes.NO_SEARCH`, "graph", or these with "folded": weights that were prepared for
            inference.
        config: its sizes.
        encode: the eager function up to the query, or None where `skipped` says why there is none.
        check: an independent computation of the same queries, from the same weights.
        table: [n_items + 1, D], what queries are scored against.
        skipped: the reason why this row has no time.
        nodes: how many separable exponentials it computes with; 0 for exact ones.
        state_mb: the weights it reads, and whatever it keeps of them in another form.
        graphs: let torch.compile use CUDA graphs.
    """

    model: str
    impl: str
    mode: str
    config: M2RecConfig | SASRecConfig
    encode: Encode | None = None
    check: Encode | None = None
    table: Tensor | None = None
    skipped: str | None = None
    nodes: int = 0
    state_mb: float | None = None
    graphs: bool = True

    @property
    def is_late(self) -> bool:
        """Is it slow to make, so that it waits until the others are done?"""
        return "compiled" in self.mode

    def answer(self, k: int) -> Answer:
        """Ids in, out come the query and the scores and ids of the k best items, all [B, ...]; never padding.

        Compiled, or captured, as a whole where the mode says so.
        """
        encode, table = self.encode, self.table
        assert encode is not None
        assert table is not None
        weight = table[1:].t()

        def run(item_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            query = encode(item_ids, lengths)
            scores, ids = (query @ weight).topk(k, dim=1)
            return query, scores, ids + 1

        if "compiled" in self.mode:
            # A CUDA graph would otherwise copy the table, as every input, at each replay.
            torch._dynamo.mark_static_address(weight)
            return _modes.compiled(run, table.device, self.graphs, self.mode != _modes.NO_SEARCH)
        return _modes.Graph(run) if "graph" in self.mode else run


def cases(names: tuple[str, ...], seqlen: int, sizes: Sizes) -> list[Case]:
    """Every row for these models at one sequence length: what runs at once, then what is compiled."""
    rows: list[Case] = []
    for name in names:
        make = _mamba_cases if name in ("m2rec", "mamba4rec") else _attention_cases
        rows += make(name, seqlen, sizes)
    rows = [dataclasses.replace(row, mode=_modes.named(row.mode, sizes.device, sizes.search)) for row in rows]

    reason = _modes.cannot_compile(sizes.device)
    if reason is not None:
        rows = [dataclasses.replace(row, skipped=reason) if row.is_late else row for row in rows]

    if not sizes.graphs:
        rows = [dataclasses.replace(row, graphs=False) for row in rows if "graph" not in row.mode]

    def place(case: Case) -> tuple[bool, int]:
        return case.skipped is not None, 1 + COMPILE_ORDER.index(case.model) if case.is_late else 0

    return sorted(rows, key=place)


def build(model_type: str, config: dict[str, Any], sizes: Sizes) -> SequentialRecommender:
    """A model with random weights in which a mistake shows, in float32 on the CPU."""
    text = None
    if config.get("text_dim"):
        text = torch.randn(sizes.n_items + 1, config["text_dim"])
        text[0] = 0
    model = build_model(model_type, {"n_items": sizes.n_items, **config}, text).eval()
    with torch.no_grad():  # start values are small: with them a wrong model would hardly differ from a right one
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
            if name.endswith("dt_proj.bias"):
                parameter.copy_(torch.log(torch.expm1(_steps(parameter))))
    return model


def _steps(like: Tensor) -> Tensor:
    """Step sizes from 0.02 to 2, about as spread over the channels as in a model trained on ML-1M for an epoch.

    They decide what a state remembers: with start values most states forget within a few positions, and the CPU engine,
    which drops what is forgotten, would be timed on less work than a trained model gives it.
    """
    low, high = math.log(0.02), math.log(2.0)
    return torch.exp(low + (high - low) * torch.rand_like(like))


def mamba_fields(name: str, seqlen: int, sizes: Sizes) -> dict[str, Any]:
    """M2Rec's config, or Mamba4Rec's, at one length."""
    fields: dict[str, Any] = {"max_len": seqlen, "d_state": sizes.d_state}
    return fields | ({"text_dim": sizes.text_dim} if name == "m2rec" else {"filter_placement": "none", "gate": "none"})


def load(module: nn.Module, model: nn.Module) -> nn.Module:
    """`module` in evaluation mode with `model`'s tensors in float32 on the CPU, shared where they are that already."""
    state = {key: value.detach().float().cpu() for key, value in model.state_dict().items()}
    text = state.pop("text", None)
    module.load_state_dict(state, assign=True)
    if text is not None:
        module.text = text  # already scaled; a buffer
    return module.eval()


def state_mb(tensors: Any) -> float:
    """What distinct tensors occupy, in units of 2^20 bytes."""
    distinct = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(distinct.values()) / 2**20


def lacking(op: str, name: str, device: torch.device) -> str | None:
    """Why an implementation is not measured on a device; None if it is. Triton's interpreter is never timed."""
    if name == "triton" and device.type != "cuda":
        return "Triton's kernels run on CUDA devices; its interpreter is for tests"
    return impl.unavailable(op, name, device)


def _mamba_cases(name: str, seqlen: int, sizes: Sizes) -> list[Case]:
    model = build("m2rec", mamba_fields(name, seqlen, sizes), sizes).to(sizes.device, sizes.dtype)
    config = model.config
    assert isinstance(config, M2RecConfig)
    specification = load(ReferenceM2Rec(config), model)

    def check(item_ids: Tensor, lengths: Tensor) -> Tensor:
        return specification(item_ids.cpu(), lengths.cpu())

    held = state_mb([*model.parameters(), *model.buffers()])
    base = Case(name, "reference", "eager", config, None, check, model.item_weight.detach(), state_mb=held)
    rows: list[Case] = []

    def add(impl: str, modes: tuple[str, ...], encode: Encode, **fields: Any) -> None:
        rows.extend(dataclasses.replace(base, impl=impl, mode=mode, encode=encode, **fields) for mode in modes)

    def lacks(impl: str, reason: str, mode: str = "eager") -> None:
        rows.append(Case(name, impl, mode, config, skipped=reason))

    add("reference", ("eager", "compiled"), through(model, "reference").encode)
    for label, kind, reason in _assembled.kinds(name, sizes.device):
        if reason is None:
            module = _assembled.like(model, kind).to(sizes.device, sizes.dtype)
            add(label, ("eager", *_graph(sizes.device, kind == "mamba_ssm")), module)
        else:
            lacks(label, reason)
    for other in ("triton", "cpu", "mamba_ssm"):
        reason = lacking("last_scan", other, sizes.device)
        if reason is None:
            add(other, ("eager", *_graph(sizes.device)), through(model, other).encode)
        else:
            lacks(other, reason)
    for other in ("triton", "cpu"):
        reason = lacking("encode_last", other, sizes.device)
        if reason is not None:
            lacks(other, reason, "folded")
            continue
        assert isinstance(model, M2Rec)
        folded = FoldedM2Rec(model, other)
        nodes = _nodes(folded, other, sizes.dtype)
        held = state_mb([*folded.folded.tensors().values(), model.item_weight.detach()])
        modes = ("folded", *(f"folded {mode}" for mode in _graph(sizes.device)))
        add(other, modes, _split(folded, sizes.device), nodes=nodes, state_mb=held)
    return rows


def _graph(device: torch.device, can: bool = True) -> tuple[str, ...]:
    return ("graph",) if can and device.type == "cuda" else ()


def _nodes(folded: FoldedM2Rec, name: str, dtype: torch.dtype) -> int:
    """How many nodes the folded model computes with. Only Triton's kernels have any, in half precision by default."""
    if name != "triton" or dtype == torch.float32:
        return 0
    nodes = accepted(folded.folded.exponentials, folded.folded.nodes)
    return 0 if nodes is None else len(nodes.coefficients)


def _split(model: FoldedM2Rec, device: torch.device) -> Encode:
    """`model.encode`, with a row's positions shared by as many programs as leave no multiprocessor idle."""
    if device.type != "cuda":
        return model.encode
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    variants: dict[int, FoldedM2Rec] = {}

    def encode(item_ids: Tensor, lengths: Tensor) -> Tensor:
        batch, seqlen = item_ids.shape
        splits = max(1, min(processors // batch, seqlen // SPLIT_POSITIONS))
        if splits not in variants:
            variants[splits] = copy.copy(model)
            variants[splits].folded = dataclasses.replace(model.folded, splits=splits)
        return variants[splits].encode(item_ids, lengths)

    return encode


def through(model: SequentialRecommender, name: str) -> SequentialRecommender:
    """The same weights through another implementation."""
    twin = copy.copy(model)
    twin.impl = name  # type: ignore[assignment]
    return twin


def _attention_cases(name: str, seqlen: int, sizes: Sizes) -> list[Case]:
    model: Any = build(name, {"max_len": seqlen}, sizes).to(sizes.device, sizes.dtype)
    exact: Any = load(build_model(name, model.config.to_dict()), model)

    def check(item_ids: Tensor, lengths: Tensor) -> Tensor:
        return exact.encode(item_ids.cpu(), lengths.cpu(), pruned=False)

    def published(item_ids: Tensor, lengths: Tensor) -> Tensor:
        return model.encode(item_ids, lengths, pruned=False)

    held = state_mb([*model.parameters(), *model.buffers()])
    return [
        Case(name, impl, mode, model.config, encode, check, model.item_weight.detach(), state_mb=held)
        for impl, encode in (("last query", model.encode), ("as published", published))
        for mode in ("eager", "compiled", *_graph(sizes.device))
    ]
