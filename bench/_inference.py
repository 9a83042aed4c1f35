"""Next-item inference as jobs: item ids in, the best items of the catalogue out."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

import torch
from torch import Tensor

from . import _bounds
from ._driver import Job, Shape
from ._options import DTYPES
from ._registry import TEXT_DIM, Answer, Case, Sizes, cases
from ._results import EVERYTHING, Row

TOPK = 10
INPUTS = 4  # batches that are rotated
CHECKED_ROWS = 4  # of a batch; the rows of a batch do not depend on each other
# A query or a score may differ from the float32 reference by so much of the largest value. float32: a thousand
# roundings of 2^-24, as many as there are terms in the sums. bfloat16 keeps 8 bits: some fifteen roundings of 2^-8
# on the way, since every layer rounds. float16 keeps 11.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class Jobs:
    """Makes the jobs of a shape; models are built once for all shapes that differ in the batch alone.

    Args:
        options: as `_options.parse` gives them.
        text_dim: width of the text embeddings of M2Rec.
        graphs: as `_registry.Sizes`.
    """

    def __init__(self, options: argparse.Namespace, text_dim: int = TEXT_DIM, graphs: bool = True) -> None:
        self._graphs = graphs
        self._search: bool = not options.quick
        self._models: tuple[str, ...] = tuple(options.models)
        self._d_state: int = options.d_state
        self._topk: int = getattr(options, "topk", min(TOPK, options.n_items))
        self._device = torch.device(options.device)
        self._text_dim = text_dim
        self._made: tuple[tuple[object, ...], list[Case]] | None = None

    def __call__(self, shape: Shape) -> list[Job]:
        sizes = Sizes(
            shape.n_items, self._d_state, self._topk, DTYPES[shape.dtype], self._device, self._text_dim,
            self._search, self._graphs,
        )  # fmt: skip
        key = (shape.dtype, shape.seq_len, shape.n_items)
        if self._made is None or self._made[0] != key:
            self._made = None  # the old ones go before the new ones come
            gc.collect()
            with torch.no_grad():  # the weights are what a user's are, not tensors of inference mode
                self._made = key, cases(self._models, shape.seq_len, sizes)
        return [job(case, made, sizes) for made in [_Inputs(shape, sizes)] for case in self._made[1]]

    def empty(self, shape: Shape) -> list[Row]:
        """A row for each model, for a shape that is not measured."""
        return [_row(model, EVERYTHING, EVERYTHING, self._d_state, shape) for model in self._models]


class _Inputs:
    """The batches of a shape and what the references make of them, computed when first asked for."""

    def __init__(self, shape: Shape, sizes: Sizes) -> None:
        self.shape = shape
        self.batches = batches(shape.batch, shape.seq_len, sizes)
        count = min(CHECKED_ROWS, shape.batch)
        self.rows = torch.linspace(0, shape.batch - 1, count).long()
        self._expected: dict[Callable[..., Tensor], Tensor] = {}

    def expected(self, check: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if check not in self._expected:
            ids, lengths = (tensor.cpu()[self.rows] for tensor in self.batches[0])
            self._expected[check] = check(ids, lengths)
        return self._expected[check]


def batches(batch: int, seqlen: int, sizes: Sizes) -> list[tuple[Tensor, Tensor]]:
    """Full rows of random items: the worst case of a length, and the same work for every model."""
    generator = torch.Generator().manual_seed(seqlen * 1009 + batch)
    return [
        (
            torch.randint(1, sizes.n_items + 1, (batch, seqlen), generator=generator).to(sizes.device),
            torch.full((batch,), seqlen, device=sizes.device),
        )
        for _ in range(INPUTS)
    ]


def job(case: Case, inputs: _Inputs, sizes: Sizes) -> Job:
    """The case as something that can be checked and measured at the inputs' shape."""
    shape = inputs.shape
    row = _row(case.model, case.impl, case.mode, getattr(case.config, "d_state", None), shape)
    row.state_mb, row.skipped = case.state_mb, case.skipped
    if case.skipped is not None:
        return Job(row)
    run = torch.inference_mode()(_call(case, inputs, sizes))
    folded = "folded" in case.mode
    work = _bounds.inference(
        case.config,
        shape.batch,
        shape.seq_len,
        sizes.dtype.itemsize,
        folded=folded,
        nodes=case.nodes,
        forgets=case.impl == "cpu",
    )
    return Job(row, run, TOLERANCE[sizes.dtype], work, case.is_late)


def _call(case: Case, inputs: _Inputs, sizes: Sizes) -> Callable[[], tuple[Callable[[int], object], float]]:
    def prepare() -> tuple[Callable[[int], object], float]:
        answer = case.answer(sizes.topk)
        error = error_of(answer, case, inputs)
        call = torch.inference_mode()(lambda turn: answer(*inputs.batches[turn % INPUTS]))
        return call, error

    return prepare


def error_of(answer: Answer, case: Case, inputs: _Inputs) -> float:
    """The largest difference from the reference of a query, or of the score of an item that was found or missed.

    Relative to the largest value of the reference, for some rows of the batch.
    """
    assert case.check is not None
    assert case.table is not None
    expected = inputs.expected(case.check).double()
    query, scores, ids = (tensor[inputs.rows.to(tensor.device)].cpu() for tensor in answer(*inputs.batches[0]))
    every = expected @ case.table[1:].cpu().double().t()
    best = every.topk(scores.shape[1], dim=1).values
    found = every.gather(1, ids - 1)
    return max(
        _relative(query.double(), expected),
        _relative(scores.double(), best, every),
        _relative(found, best, every),
    )


def _relative(got: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    return float((got - expected).abs().max() / (expected if scale is None else scale).abs().max())


def _row(model: str, impl: str, mode: str, d_state: int | None, shape: Shape) -> Row:
    return Row(model, impl, mode, shape.dtype, shape.batch, shape.seq_len, d_state, shape.n_items)
