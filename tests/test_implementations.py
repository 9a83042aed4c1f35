"""The whole model through every implementation that runs here: the same queries and gradients, from one state_dict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastm2rec import ImplementationError, M2Rec, M2RecConfig, M2RecEncoder, impl
from tests._bounds import BAND, SLACK

N_ITEMS, LENGTH, T = 11, 9, 5
EPS = torch.finfo(torch.float32).eps
SMALL: dict[str, Any] = {"n_items": N_ITEMS, "max_len": LENGTH, "d_model": 16, "d_state": 3, "dropout": 0.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {"text_dim": T},
    "filter at the input, dct, vector gate": {
        "text_dim": T, "filter_placement": "input", "basis": "dct", "gate": "vector", "gate_residual": True
    },
    "valid spectrum, stride, context gate": {
        "text_dim": T, "spectrum": "valid", "stride": 2, "gate": "context", "theta": 0.3
    },
    "soft mask, no text": {"mask": "soft", "gate": "linear"},
    "straight-through mask, two layers, norm": {
        "mask": "straight_through", "gate": "none", "n_layers": 2, "scan_norm": True
    },
    "mamba4rec": {"filter_placement": "none", "gate": "none"},
    "filter that keeps all": {"theta": 0.5, "gate": "none"},
}  # fmt: skip


def _model(fields: dict[str, Any], device: torch.device) -> M2Rec:
    torch.manual_seed(3)
    config = M2RecConfig(**{**SMALL, **fields})
    text = None
    if config.uses_text:
        text = torch.randn(N_ITEMS + 1, T)
        text[0] = 0
    model = M2Rec(config, text)
    with torch.no_grad():  # start values are small: with them a wrong model would hardly differ from a right one
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(device)


def _batch(device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([LENGTH, 1, 4])
    item_ids = torch.randint(1, N_ITEMS + 1, (3, LENGTH))
    return item_ids.masked_fill(torch.arange(LENGTH) >= lengths[:, None], 0).to(device), lengths.to(device)


def _others(device: torch.device) -> list[str]:
    return [
        name for name in impl.names()
        if name not in (impl.AUTO, "reference") and impl.unavailable("last_state", name, device) is None
    ]  # fmt: skip


def _run(model: M2Rec, name: str, batch: tuple[Tensor, Tensor], dy: Tensor) -> dict[str, Tensor]:
    model.impl = name
    y = model.encode(*batch)
    model.zero_grad()
    y.backward(dy.to(y.dtype))
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    return {"queries": y.detach(), **gradients}


def _lost(values: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The error of each tensor relative to its largest value.

    An error anywhere reaches all of them, so a tensor is held against the worst of plain PyTorch's, not its own: a
    single number may be right by chance.
    """
    return {
        key: float((values[key].double() - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for key, value in exact.items()
        if value.abs().max() > 0
    }


def _sensitivity(model: M2Rec, exact: dict[str, Tensor], batch: tuple[Tensor, Tensor], dy: Tensor) -> dict[str, float]:
    """How far the exact result moves when every parameter moves by one rounding: no float32 program can do better.

    The gradient of theta is one number, a sum in which much cancels: it moves the most.
    """
    state = model.state_dict()
    moved: dict[str, float] = dict.fromkeys(exact, 0.0)
    for _ in range(3):
        signs = {key: torch.randint(0, 2, value.shape, device=value.device) * 2 - 1 for key, value in state.items()}
        model.load_state_dict({key: value * (1 + EPS * signs[key]) for key, value in state.items()})
        run = _lost(_run(model, "reference", batch, dy), exact)
        moved = {key: max(run.get(key, 0.0), value) for key, value in moved.items()}
    return moved


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_queries_and_gradients(fields: dict[str, Any], device: torch.device) -> None:
    model, batch = _model(fields, device), _batch(device)
    dy = torch.randn(3, SMALL["d_model"], device=device)
    plain = _run(model, "reference", batch, dy)
    exact_model = _model(fields, device).double()
    exact_model.load_state_dict(model.state_dict())
    exact = _run(exact_model, "reference", batch, dy)
    sensitive = _sensitivity(exact_model, exact, batch, dy)
    others = _others(device)
    assert others or device.type == "cpu"
    for other in others:
        got = _run(model, other, batch, dy)
        assert got.keys() == plain.keys()
        worst = max(_lost(plain, exact).values())
        for key, lost in _lost(got, exact).items():
            assert lost <= SLACK * worst + BAND * (sensitive[key] + EPS), f"{other}: {key} loses {lost:.1e}"


def test_a_batch_larger_than_the_catalogue_projects_the_text_once(device: torch.device) -> None:
    model = _model({"text_dim": T}, device).eval()
    item_ids = torch.randint(1, N_ITEMS + 1, (2 * N_ITEMS, LENGTH), device=device)
    lengths = torch.full((2 * N_ITEMS,), LENGTH, device=device)
    for name in ("reference", *_others(device)):
        model.impl = name
        together = model.encode(item_ids, lengths)
        apart = torch.cat([model.encode(*rows) for rows in zip(item_ids.split(4), lengths.split(4), strict=True)])
        torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("placement", ["inner", "input", "none"])
def test_every_position(placement: Any, device: torch.device) -> None:
    encoder = M2RecEncoder(filter_placement=placement, max_len=LENGTH, d_model=16, d_state=3, dropout=0.0).to(device)
    x, lengths = torch.randn(3, LENGTH, 16, device=device), _batch(device)[1]
    expected = encoder(x, lengths, impl="reference")
    for other in _others(device):
        torch.testing.assert_close(encoder(x, lengths, impl=other), expected)


def test_an_implementation_that_cannot_run_is_refused_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = _model({"gate": "none"}, torch.device("cpu"))
    model.impl = "triton"
    with pytest.raises(ImplementationError, match="impl='triton' was asked for .* on cpu"):
        model.encode(*_batch(torch.device("cpu")))


def test_kernels_run_with_their_tensors_device_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, wherever the tensors are."""
    current = ["cuda:0"]

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(str(wanted))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", device)
    ops = impl._on_their_device({"scan": lambda x, other: (current[-1], other)})
    there = FakeTensor(FakeTensorMode(), torch.empty(1, device="meta"), torch.device("cuda:1"))
    assert ops["scan"](there, other=5) == ("cuda:1", 5)
    assert ops["scan"](torch.empty(1), 5) == ("cuda:0", 5)


def test_the_model_compiles_through_the_kernels(device: torch.device) -> None:
    model, batch = _model({"gate": "linear"}, device).eval(), _batch(device)
    for other in _others(device):
        model.impl = other
        expected = model.encode(*batch)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*batch), expected)
