"""A training step as jobs: forward, cross-entropy over the catalogue, backward, Adam.

The loss is at the last position for every model, as M2Rec's filter demands. SASRec "as published" has it at all
positions, BERT4Rec "as published" at masked ones: a step of theirs costs more and learns from more targets, so
`positions` stands beside its time.

What is timed is what was checked. So there is no dropout, by which the Transformers gain, as they drop more; and Adam's
learning rate is 0: it does all its arithmetic, and the weights stay those whose gradients were compared. bfloat16 is
autocast over float32 weights.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastm2rec.base import build_model
from fastm2rec.config import M2RecConfig, SASRecConfig
from fastm2rec.losses import next_item_loss
from fastm2rec.reference.m2rec import M2Rec as ReferenceM2Rec

from . import _assembled, _bounds, _inference, _modes, _registry
from ._driver import Job, Shape
from ._options import DTYPES
from ._registry import COMPILE_ORDER, Sizes, build, load, mamba_fields, state_mb
from ._results import EVERYTHING, Row

INPUTS = 2  # batches that are rotated
CHECKED_ROWS = 4
MASKED = 0.2  # of the positions, BERT4Rec's mask_prob
# Of a gradient's largest value: three times what a query may lose, as there are two products backward for each of the
# products of the way forward, which come after them.
TOLERANCE = {dtype: 3 * tolerance for dtype, tolerance in _inference.TOLERANCE.items()}
# A gradient smaller than this part of the largest one is compared on that scale: where larger terms cancel, their
# roundings are left. Half precision leaves eight roundings of 2^-8 (2^-11); float32 is held to the small ones too.
SMALL = {torch.float32: 1e-3, torch.bfloat16: 8 * 2.0**-8, torch.float16: 8 * 2.0**-11}

# ids [B, L], lengths [B], targets [B, L] (the item after each) and places [B, M] (positions to mask) to queries [n, D]
# and the items that they should find [n].
Asked = Callable[[Any, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def at_last(model: Any, ids: Tensor, lengths: Tensor, targets: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    return model(ids, lengths), targets.gather(1, lengths[:, None] - 1).squeeze(1)


def at_all(model: Any, ids: Tensor, lengths: Tensor, targets: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    return model.hidden(ids, lengths).flatten(0, 1), targets.flatten()


def at_masked(model: Any, ids: Tensor, lengths: Tensor, targets: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    hidden = model.hidden(ids.scatter(1, places, model.mask_token), lengths)
    return (
        hidden.gather(1, places.unsqueeze(2).expand(-1, -1, hidden.shape[2])).flatten(0, 1),
        ids.gather(1, places).flatten(),
    )


ASKED: dict[str, Asked] = {"last": at_last, "all": at_all, "masked": at_masked}


@dataclass
class Case:
    """One row to be; fields as of `_registry.Case`.

    Args:
        module: what is trained; its parameters are its own.
        specification: the same parameters, by the same names, in float32 on the CPU.
        positions: where the loss is, a key of `ASKED`.
    """

    model: str
    impl: str
    mode: str
    config: M2RecConfig | SASRecConfig
    module: nn.Module | None = None
    specification: nn.Module | None = None
    positions: str = "last"
    skipped: str | None = None
    graphs: bool = True

    @property
    def is_late(self) -> bool:
        """As `_registry.Case.is_late`."""
        return "compiled" in self.mode


class Step:
    """A training step of a case as a function of a batch; the gradients stay in the parameters."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        assert case.module is not None
        module, asked = case.module, ASKED[case.positions]
        self.parameters = dict(module.named_parameters())
        self.dtype = dtype
        self._buffers = list(module.buffers())
        graph = case.mode == "graph"
        self._optimizer = torch.optim.Adam(self.parameters.values(), lr=0.0, fused=True, capturable=graph)

        def loss(ids: Tensor, lengths: Tensor, targets: Tensor, places: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                queries, wanted = asked(module, ids, lengths, targets, places)
                return next_item_loss(queries, _item_weight(module), wanted)

        if case.is_late:
            self._loss = _modes.compiled(loss, device, case.graphs, case.mode != _modes.NO_SEARCH)
        else:
            self._loss = loss
        self._run: Callable[..., Tensor] = _modes.Graph(self._step) if graph else self._step

    def __call__(self, *batch: Tensor) -> Tensor:
        return self._run(*batch)

    def state_mb(self) -> float:
        """Weights, gradients, moments and buffers, once a step has made them."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        moments = [value for value in moments if isinstance(value, Tensor)]
        return state_mb([*self.parameters.values(), *self._buffers, *grads, *moments])

    def _step(self, *batch: Tensor) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(*batch)
        loss.backward()
        self._optimizer.step()
        return loss.detach()


def _item_weight(module: Any) -> Tensor:
    """[n_items + 1, D], what queries are scored against; the specification has no name for it."""
    return module.item_embedding.weight if isinstance(module, ReferenceM2Rec) else module.item_weight


def cases(names: Sequence[str], seqlen: int, sizes: Sizes) -> list[Case]:
    """Every row for these models at one sequence length: what runs at once, then what is compiled."""
    rows: list[Case] = []
    for name in names:
        rows += (_mamba_cases if name in ("m2rec", "mamba4rec") else _attention_cases)(name, seqlen, sizes)
    rows = [dataclasses.replace(row, mode=_modes.named(row.mode, sizes.device, sizes.search)) for row in rows]
    reason = _modes.cannot_compile(sizes.device)
    if reason is not None:
        rows = [dataclasses.replace(row, skipped=reason) if row.is_late else row for row in rows]

    if not sizes.graphs:
        rows = [dataclasses.replace(row, graphs=False) for row in rows if row.mode != "graph"]

    def place(case: Case) -> tuple[bool, int]:
        return case.skipped is not None, 1 + COMPILE_ORDER.index(case.model) if case.is_late else 0

    return sorted(rows, key=place)


def _modes_of(device: torch.device, *modes: str) -> tuple[str, ...]:
    return (*modes, "graph") if device.type == "cuda" else modes


def _mamba_cases(name: str, seqlen: int, sizes: Sizes) -> list[Case]:
    model = build("m2rec", {**mamba_fields(name, seqlen, sizes), "dropout": 0.0}, sizes)
    config = model.config
    assert isinstance(config, M2RecConfig)
    specification = _own(load(ReferenceM2Rec(config), model))
    rows: list[Case] = []

    def add(label: str, modes: Sequence[str], module: nn.Module) -> None:
        rows.extend(Case(name, label, mode, config, _own(module).to(sizes.device), specification) for mode in modes)

    add("reference", ("eager", "compiled"), _registry.through(model, "reference"))
    for label, kind, reason in _assembled.kinds(name, sizes.device):
        if reason is None:
            modes = _modes_of(sizes.device, "eager") if kind == "mamba_ssm" else ("eager",)
            add(label, modes, _assembled.like(model, kind))
        else:
            rows.append(Case(name, label, "eager", config, skipped=reason))
    for other in ("triton", "cpu", "mamba_ssm"):
        reason = _registry.lacking("last_scan", other, sizes.device)
        if reason is None:
            add(other, _modes_of(sizes.device, "eager"), _registry.through(model, other))
        else:
            rows.append(Case(name, other, "eager", config, skipped=reason))
    return rows


def _attention_cases(name: str, seqlen: int, sizes: Sizes) -> list[Case]:
    model = build(name, {"max_len": seqlen, "dropout": 0.0}, sizes)
    specification = _own(load(build_model(name, model.config.to_dict()), model))
    assert isinstance(model.config, SASRecConfig)
    published = "all" if name == "sasrec" else "masked"
    return [
        Case(name, label, mode, model.config, _own(model).to(sizes.device), specification, positions)
        for label, positions in (("last query", "last"), ("as published", published))
        for mode in _modes_of(sizes.device, "eager", "compiled")
    ]


def _own(module: nn.Module) -> nn.Module:
    """A copy whose parameters have their own storage and gradients, with dropout of 0 in training mode."""
    return copy.deepcopy(module).train()


class Jobs:
    """Makes the jobs of a shape; models are built anew for each, as their gradients and moments take memory.

    Args:
        options: as `_options.parse` gives them.
        graphs: as `_registry.Sizes`.
    """

    def __init__(self, options: argparse.Namespace, graphs: bool = True) -> None:
        self._graphs = graphs
        self._search: bool = not options.quick
        self._models: tuple[str, ...] = tuple(options.models)
        self._d_state: int = options.d_state
        self._device = torch.device(options.device)

    def __call__(self, shape: Shape) -> list[Job]:
        dtype = DTYPES[shape.dtype]
        sizes = Sizes(
            shape.n_items, self._d_state, 1, dtype, self._device, search=self._search, graphs=self._graphs
        )  # fmt: skip
        inputs = _Inputs(shape, self._device)
        return [job(case, inputs, dtype, self._device) for case in cases(self._models, shape.seq_len, sizes)]

    def empty(self, shape: Shape) -> list[Row]:
        """A row for each model, for a shape that is not measured."""
        return [_row(Case(model, EVERYTHING, EVERYTHING, SASRecConfig()), shape) for model in self._models]


class _Inputs:
    """Batches to time, and one to check whose rows are a few rows repeated: its mean loss is that of the few."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(shape.seq_len * 1009 + shape.batch)

        def batch(rows: int) -> tuple[Tensor, ...]:
            items = torch.randint(1, shape.n_items + 1, (rows, shape.seq_len + 1), generator=generator)
            masked = max(1, round(MASKED * shape.seq_len))
            places = torch.rand(rows, shape.seq_len, generator=generator).argsort(1)[:, :masked].sort(1).values
            return items[:, :-1].contiguous(), torch.full((rows,), shape.seq_len), items[:, 1:].contiguous(), places

        self.batches = [tuple(tensor.to(device) for tensor in batch(shape.batch)) for _ in range(INPUTS)]
        few = next(count for count in (CHECKED_ROWS, 3, 2, 1) if shape.batch % count == 0)
        self.few = batch(few)
        repeated = (tensor.repeat(shape.batch // few, *[1] * (tensor.dim() - 1)) for tensor in self.few)
        self.repeated = tuple(tensor.to(device) for tensor in repeated)
        self._expected: dict[tuple[int, str], dict[str, Tensor]] = {}

    def expected(self, case: Case) -> dict[str, Tensor]:
        """The specification's gradients, and its loss under the name "loss"."""
        specification = case.specification
        assert specification is not None
        key = (id(specification), case.positions)
        if key not in self._expected:
            specification.zero_grad(set_to_none=True)
            queries, wanted = ASKED[case.positions](specification, *self.few)
            loss = F.cross_entropy(queries @ _item_weight(specification)[1:].t(), wanted - 1)
            loss.backward()
            self._expected[key] = {
                name: parameter.grad.double()
                for name, parameter in specification.named_parameters()
                if parameter.grad is not None
            } | {"loss": loss.detach().double()}
        return self._expected[key]


def job(case: Case, inputs: _Inputs, dtype: torch.dtype, device: torch.device) -> Job:
    """The case as something that can be checked and measured at the inputs' shape."""
    shape = inputs.shape
    row = _row(case, shape)
    if case.module is None or case.skipped is not None:
        row.skipped = case.skipped
        return Job(row)

    def prepare() -> tuple[Callable[[int], object], float]:
        step = Step(case, dtype, device)
        error = error_of(step, case, inputs)
        row.state_mb = step.state_mb()
        return lambda turn: step(*inputs.batches[turn % INPUTS]), error

    queries = {"last": 1, "all": shape.seq_len, "masked": inputs.few[3].shape[1]}[case.positions]
    work = _bounds.training(
        case.config, shape.batch, shape.seq_len, queries=queries, everywhere=case.positions != "last",
        parameters=sum(parameter.numel() for parameter in case.module.parameters()),
        forgets=case.impl == "cpu",
    )  # fmt: skip
    return Job(row, prepare, TOLERANCE[dtype], work, case.is_late)


def error_of(step: Step, case: Case, inputs: _Inputs) -> float:
    """The largest difference of a gradient, or of the loss, from the specification's.

    Relative to each gradient's largest value, which counts as no smaller than `SMALL` of the largest of all.
    """
    expected = inputs.expected(case)
    got = {"loss": step(*inputs.repeated)}
    got |= {name: parameter.grad for name, parameter in step.parameters.items() if parameter.grad is not None}
    if got.keys() != expected.keys():
        raise RuntimeError(f"expected gradients for {sorted(expected)}, got {sorted(got)}")
    floor = SMALL[step.dtype] * max(
        float(gradient.abs().max()) for name, gradient in expected.items() if name != "loss"
    )
    return max(
        float((got[name].double().cpu() - gradient).abs().max()) / max(float(gradient.abs().max()), floor)
        for name, gradient in expected.items()
    )


def _row(case: Case, shape: Shape) -> Row:
    d_state = getattr(case.config, "d_state", None)
    row = Row(case.model, case.impl, case.mode, shape.dtype, shape.batch, shape.seq_len, d_state, shape.n_items)
    row.phase, row.positions = "training", case.positions
    return row
