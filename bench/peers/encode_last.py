"""Item ids to query vectors on folded weights, against the model as one would assemble it: torch.fft for the filter,
torch's convolution, mamba-ssm's scan where it is installed, every position computed and the last one taken."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench import _assembled, _bounds
from bench.peers._problem import INPUTS, Arguments, Peer, Problem, Shape
from fastm2rec import M2Rec, M2RecConfig, impl
from fastm2rec.basis import n_columns
from fastm2rec.folded import FoldedM2Rec
from fastm2rec.reference.m2rec import M2Rec as ReferenceM2Rec

N_ITEMS, TEXT_DIM = 3706, 384
SPECIAL = 3  # SiLU, and softplus with an exponential and a logarithm


def problem(shape: Shape, device: torch.device, autotune: bool) -> Problem:
    """item_ids [B, L] and lengths [B]."""
    assert shape.d_state is not None
    generator = torch.Generator().manual_seed(shape.seq_len)
    config = M2RecConfig(n_items=N_ITEMS, max_len=shape.seq_len, d_state=shape.d_state, text_dim=TEXT_DIM)
    text = torch.randn(N_ITEMS + 1, TEXT_DIM, generator=generator)
    text[0] = 0
    model = M2Rec(config, text).eval()
    with torch.no_grad():  # start values are small: with them a wrong model would hardly differ from a right one
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    specification = ReferenceM2Rec(config, text).eval()
    specification.load_state_dict(model.state_dict())
    dtype = shape.torch_dtype

    def folded(name: str, exponentials: str = "exact", splits: int = 1) -> Peer:
        reason = impl.unavailable("encode_last", name, device)
        if reason is not None:
            return Peer(name, "eager", None, reason, trains=False)
        twin = FoldedM2Rec(model, name, exponentials=exponentials, splits=splits).to(device, dtype)
        return Peer(name, "eager", twin.encode, trains=False)

    def arguments() -> Arguments:
        ids = torch.randint(1, N_ITEMS + 1, (shape.batch, shape.seq_len), generator=generator).to(device)
        return ids, torch.full((shape.batch,), shape.seq_len, device=device)

    exact = folded("triton")
    nodes = folded("triton", "auto")  # takes nodes where their fit passes
    if dtype == torch.float32 and nodes.skipped is None:
        nodes = Peer("triton", "eager", None, "the folded model computes with nodes in half precision only")
    columns = n_columns(shape.seq_len, config.theta, config.basis)
    peers = [
        exact,
        Peer(
            "triton, nodes",
            "eager",
            nodes.run,
            nodes.skipped,
            work=_work(shape, columns, 2, shape.d_state),
            trains=False,
        ),
        # The engine leaves out states that have forgotten all they saw: what no data can spare is counted.
        replace(folded("cpu"), work=_work(shape, columns, 0, 0)),
        *_assembled_peers(model, dtype, device),
    ]
    if shape.batch < 64:  # too few rows to fill a GPU: each is shared by several programs
        split = folded("triton", splits=8)
        peers.insert(2, Peer("triton, 8 splits", "eager", split.run, split.skipped, trains=False))
    specification.to(device)
    return Problem(
        what=f"D={config.d_model}, {N_ITEMS} items",
        inputs=[arguments() for _ in range(INPUTS)],
        batched=(True, True),
        learned=(False, False),
        reference=specification,
        peers=peers,
        work=_work(shape, columns, shape.d_state, shape.d_state),
    )


def _assembled_peers(model: M2Rec, dtype: torch.dtype, device: torch.device) -> list[Peer]:
    """What a user would put together, with every scan that there is."""
    found = []
    for name, kind, reason in _assembled.kinds("m2rec", device):
        run = None if reason else _assembled.like(model, kind).to(device, dtype)
        found.append(Peer(name, "eager", run, reason, trains=False))
    return found


def _work(shape: Shape, columns: int, exponentials: int, states: int) -> _bounds.Work:
    """For each position: the convolution, the filter there and back, B, C's part and the step size, the closed form.

    in_proj is folded into tables, of which the ids pick rows: no row is read from memory twice.
    """
    d_model, d_conv = 64, 4
    e, rank = 2 * d_model, d_model // 16
    places = shape.batch * shape.seq_len
    operations = places * e * (2 * d_conv + 4 * columns + 2 * (rank + states) + 2 * rank + 4 * states)
    operations += shape.batch * (2 * e * d_model + 16 * d_model * d_model + 2 * d_model * d_model)
    tables = min(places, N_ITEMS) * e + min(shape.batch, N_ITEMS) * (e + d_model)
    return _bounds.Work(
        special=float(places * e * (exponentials + SPECIAL)),
        operations=float(operations),
        bytes=float(8 * places + shape.torch_dtype.itemsize * (tables + shape.batch * d_model)),
    )
