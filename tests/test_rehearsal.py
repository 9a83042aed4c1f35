"""What runs on a GPU mixes no devices, copies nothing between them and waits for nothing, seen without one.

Waiting and copying also spoil the capture of a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.counters import kernel_names
from fastm2rec import M2Rec, M2RecConfig, Recommender, ops, recommender
from fastm2rec.base import SequentialRecommender, build_model
from fastm2rec.folded import FoldedM2Rec
from fastm2rec.kernels._nodes import Nodes
from fastm2rec.losses import next_item_loss
from fastm2rec.reference.m2rec import M2Rec as ReferenceM2Rec
from fastm2rec.training.inputs import make_model
from fastm2rec.training.objective import Objective, make_question
from tests import _runs
from tests._rehearsal import DEVICE, Rehearsal, WaitError, rehearsal

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("there is a GPU, on which other tests run", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

N_ITEMS, T = 40, 5
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "filter at the input": {"filter_placement": "input"},
    "no filter": {"filter_placement": "none", "gate": "none"},
    "soft mask, vector gate": {"mask": "soft", "gate": "vector"},
    "straight-through mask, dct": {"mask": "straight_through", "basis": "dct"},
    "valid spectrum, stride": {"spectrum": "valid", "stride": 2, "gate": "context", "gate_residual": True},
    "valid spectrum at the input": {"spectrum": "valid", "filter_placement": "input", "gate": "linear"},
    "norm": {"scan_norm": True, "d_state": 64},
    "two layers": {"n_layers": 2},
    "columns in stages": {"max_len": 512, "theta": 0.2},
    "transforms": {"max_len": 2048, "theta": 0.4},
}
# Few rows of text are gathered before they are projected, many after.
BATCHES = (7, N_ITEMS + 1)


@pytest.fixture
def gpu() -> Iterator[Rehearsal]:
    with rehearsal() as made:
        yield made


def model_of(fields: dict[str, Any]) -> M2Rec:
    config = M2RecConfig(**{"n_items": N_ITEMS, "max_len": 24, "d_model": 16, "text_dim": T, **fields})
    if not config.uses_text:
        return M2Rec(dataclasses.replace(config, text_dim=0), impl="triton")
    text = torch.randn(N_ITEMS + 1, T)
    text[0] = 0
    return M2Rec(config, text, impl="triton")


def batch(rows: int, seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, lengths and targets."""
    return (
        torch.ones(rows, seqlen, dtype=torch.int64, device=DEVICE),
        torch.ones(rows, dtype=torch.int64, device=DEVICE),
        torch.ones(rows, dtype=torch.int64, device=DEVICE),
    )


def train(form: str, amp: bool, gpu: Rehearsal) -> None:
    model = gpu.module(model_of(FORMS[form]).train())
    assert isinstance(model, M2Rec)

    def losses() -> None:
        for rows in BATCHES:
            item_ids, lengths, targets = batch(rows, model.config.max_len)
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                query = model(item_ids, lengths)
                assert query.device == DEVICE
                next_item_loss(query, model.item_weight, targets)

    gpu.run(losses)


def fold_and_encode(form: str, dtype: torch.dtype, gpu: Rehearsal) -> None:
    model = FoldedM2Rec(model_of(FORMS[form]).eval(), "triton").to(dtype=dtype)
    folded = model.folded
    moved: dict[str, Any] = {name: gpu.tensor(tensor) for name, tensor in folded.tensors().items()}
    model.folded = dataclasses.replace(folded, **moved, nodes=on_gpu(folded.nodes, gpu))
    for splits in (1, 4):
        model.folded = dataclasses.replace(model.folded, splits=splits)
        query = gpu.run(lambda: model.encode(*batch(3, folded.max_len)[:2]))
        assert (query.shape, query.dtype, query.device) == ((3, 16), dtype, DEVICE)


def on_gpu(nodes: Nodes, gpu: Rehearsal) -> Nodes:
    return dataclasses.replace(nodes, rates=gpu.tensor(nodes.rates), coefficients=gpu.tensor(nodes.coefficients))


def run_what_no_model_asks_for(gpu: Rehearsal) -> None:
    """The last state by nodes and in parts; a norm behind the gate, and more rows than one program gathers."""
    A = -torch.arange(1.0, 17).expand(32, 16).contiguous()
    nodes = on_gpu(ops.fit_nodes(A), gpu)
    u, delta = (gpu.tensor(torch.empty(3, 50, 32).transpose(1, 2)) for _ in range(2))
    B, C, rates = gpu.tensor(torch.empty(3, 16, 50)), gpu.tensor(torch.empty(3, 16)), gpu.tensor(A)
    gpu.run(lambda: ops.last_state(u, delta, rates, B, C, exponentials="nodes", nodes=nodes, impl="triton"))
    gpu.run(lambda: ops.last_state(u, delta, rates, B, C, splits=4, impl="triton"))
    h, text, weight = (gpu.tensor(torch.empty(n, 16)) for n in (600, 5, 16))
    half, row = gpu.tensor(torch.empty(())), gpu.tensor(torch.empty(16))
    ids = gpu.tensor(torch.zeros(600, dtype=torch.int64))
    gpu.run(
        lambda: ops.gated_fusion(
            h, text, half, half, weight, row, ids=ids, norm_weight=row, norm_bias=row, impl="triton"
        )
    )


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_training(form: str, amp: bool, gpu: Rehearsal) -> None:
    """Forward, loss, and each op's backward pass."""
    train(form, amp, gpu)
    assert any("bwd" in name or "backward" in name for name in gpu.launched)
    assert not gpu.copies
    # The first tensor of each is what the encoder hands on from op to op.
    for name in ("fused_kernel", "analyse_kernel", "last_state_exact_kernel", "_forward_kernel"):
        if name in gpu.dtypes:
            assert gpu.dtypes[name][0] == (torch.bfloat16 if amp else torch.float32), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "two layers"])
def test_folded(form: str, dtype: torch.dtype, gpu: Rehearsal) -> None:
    fold_and_encode(form, dtype, gpu)
    assert {"encode_last_scan_kernel", "encode_last_head_kernel"} <= set(gpu.launched)
    assert not gpu.copies


def test_every_kernel_is_launched(gpu: Rehearsal) -> None:
    for form in FORMS:
        train(form, False, gpu)
    for form in ("filter at the input", "columns in stages"):
        fold_and_encode(form, torch.bfloat16, gpu)
    run_what_no_model_asks_for(gpu)
    assert set(gpu.launched) == set(kernel_names())
    assert not gpu.copies


@pytest.mark.parametrize("name", ["sasrec", "bert4rec"])
def test_baselines(name: str, gpu: Rehearsal) -> None:
    model = gpu.module(build_model(name, {"n_items": N_ITEMS, "max_len": 24}).train())
    assert isinstance(model, SequentialRecommender)
    item_ids, lengths, targets = gpu.run(lambda: batch(7, 24))
    gpu.run(lambda: next_item_loss(model(item_ids, lengths), model.item_weight, targets))
    gpu.run(lambda: model.hidden(item_ids, lengths))
    assert not gpu.copies


@pytest.mark.parametrize("form", ["default", "filter at the input", "straight-through mask, dct", "no filter"])
def test_assembled_from_transforms(form: str, gpu: Rehearsal) -> None:
    """The specification is also what peers of the benchmarks are made of."""
    config = model_of(FORMS[form]).config
    model = gpu.module(ReferenceM2Rec(config))
    if config.uses_text:
        model.text = gpu.tensor(torch.empty(N_ITEMS + 1, T))
    assert gpu.run(lambda: model(*batch(3, config.max_len)[:2])).device == DEVICE
    assert not gpu.copies


@pytest.mark.parametrize(
    ("name", "options"),
    [("m2rec", {}), ("sasrec", {"positions": "all"}), ("bert4rec", {}), ("sasrec", {"loss": "bce"})],
)
def test_a_step_of_training(name: str, options: dict[str, Any], gpu: Rehearsal) -> None:
    config, data = _runs.config(name, **options), _runs.inputs()
    model = make_model(config, data)
    question = make_question(config, model, data.dataset)
    inputs = Objective.inputs(*question.batch(question.epoch_indices(0, 0)[:7]))
    objective = gpu.module(Objective(model, question, config).train())
    assert gpu.run(lambda: objective(*map(gpu.tensor, inputs))).device == DEVICE
    assert not gpu.copies


def test_a_model_that_is_not_folded_answers_on_a_gpu(gpu: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Recommender(build_model("sasrec", {"n_items": N_ITEMS, "max_len": 24}))
    gpu.module(made._encode_sound.__self__)  # type: ignore[attr-defined]
    made.device = DEVICE
    monkeypatch.setattr(recommender, "_integers", lambda values: torch.ones(len(list(values)), dtype=torch.int64))
    assert gpu.run(lambda: made._encode_rows([[1, 2], [3]])).device == DEVICE
    assert len(gpu.copies) == 2  # ids and lengths


def test_values_are_read_where_that_is_asked_for(gpu: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpu.module(model_of({}))
    gpu.run(lambda: model(*batch(3, 24)[:2]))
    monkeypatch.setenv("FASTM2REC_CHECK", "1")
    with pytest.raises(WaitError):
        gpu.run(lambda: model(*batch(3, 24)[:2]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu.run(lambda: model(*batch(3, 24)[:2]))


def test_it_sees(gpu: Rehearsal) -> None:
    """What it is there to find is found."""
    here = torch.ones(3)
    there = gpu.tensor(here)
    with pytest.raises(RuntimeError, match="device"):
        gpu.run(lambda: there + torch.ones(3))
    for read in (bool, int, float, Tensor.item, Tensor.tolist):
        with pytest.raises(WaitError):
            gpu.run(lambda read=read: read(there.sum()))  # type: ignore[misc]
    with pytest.raises(Exception, match="_local_scalar_dense"):
        gpu.run(lambda: torch.ops.aten._local_scalar_dense(there.sum()))
    with pytest.raises(Exception, match="nonzero"):
        gpu.run(lambda: torch.ops.aten.nonzero(there))
    assert not gpu.copies
    gpu.run(lambda: torch.arange(3).to(DEVICE))
    assert len(gpu.copies) == 1
    with pytest.raises(AssertionError, match="a_kernel was given tensors on {'cpu'}"):
        gpu.launch("a_kernel", (1,), [there, here])
