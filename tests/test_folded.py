"""Folding, and the specification on folded weights, against the model that was folded."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastm2rec import M2Rec, M2RecConfig, ops
from fastm2rec.folded import COLUMN_TILE, Folded, FoldedM2Rec, fold
from fastm2rec.reference.encode_last import encode_last
from fastm2rec.reference.m2rec import M2Rec as ReferenceM2Rec

N_ITEMS, T = 30, 5


def build(max_len: int = 24, **fields: Any) -> M2Rec:
    """A float64 model with weights that are all far from their symmetric start."""
    gate = fields.get("gate", "scalar")
    sizes = {"n_items": N_ITEMS, "max_len": max_len, "d_model": 16, "d_state": 4, "theta": 0.15}
    config = M2RecConfig(**{**sizes, "text_dim": 0 if gate in ("none", "linear") else T, **fields})
    text = torch.randn(N_ITEMS + 1, T)
    text[0] = text[7] = 0  # padding, and an item without text
    model = M2Rec(config, text if config.uses_text else None).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("theta_logit"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch(lengths: list[int], seqlen: int) -> tuple[Tensor, Tensor]:
    """Rows of `lengths`; behind them stands anything but padding, which must not be read."""
    return torch.randint(1, N_ITEMS + 1, (len(lengths), seqlen)), torch.tensor(lengths)


def padded(item_ids: Tensor, lengths: Tensor) -> Tensor:
    return item_ids.masked_fill(torch.arange(item_ids.shape[1]) >= lengths[:, None], 0)


VARIANTS: list[dict[str, Any]] = [
    {
        "filter_placement": placement,
        "mask": mask,
        "basis": basis,
        "spectrum": spectrum,
        "stride": stride,
        "gate": "none",
    }
    for placement in ("inner", "input")
    for mask, stride in (("hard", 1), ("soft", 3))
    for basis in ("fourier", "dct")
    for spectrum in ("padded", "valid")
] + [
    {"filter_placement": "none", "gate": "none"},
    {"filter_placement": "none", "stride": 2},
    {"theta": 0.5, "filter_placement": "input"},  # keeps everything
    {"theta": 0.0},
    {"mask": "straight_through", "stride": 30},  # one position of each row is left
    {"gate": "scalar", "gate_residual": True},
    {"gate": "vector"},
    {"gate": "context"},
    {"gate": "context", "gate_residual": True, "scan_norm": True},
    {"gate": "linear", "gate_residual": True},
    {"d_conv": 2, "expand": 1, "dt_rank": 3, "ffn_mult": 1, "d_model": 10, "d_state": 5},
    {"d_conv": 1, "max_len": 1},
    {"d_conv": 6, "max_len": 4},  # more taps than slots
]


def identify(fields: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in fields.items())


@pytest.mark.parametrize("fields", VARIANTS, ids=identify)
def test_the_folded_specification_is_the_models(fields: dict[str, Any]) -> None:
    """float64: products in another order, nothing else, so rounding alone is allowed."""
    model = build(**fields)
    full = model.max_len
    reference = ReferenceM2Rec(model.config, model.text).double().eval()
    reference.load_state_dict(model.state_dict())
    folded = fold(model)
    lengths = sorted({1, min(2, full), min(7, full), full - full // 4, full})
    for seqlen in (full, max(lengths[:-1], default=1)):
        item_ids, n = batch([x for x in lengths if x <= seqlen], seqlen)
        found = encode_last(item_ids, n, folded)
        assert found.dtype == torch.float64
        with torch.no_grad():
            torch.testing.assert_close(found, model.encode(padded(item_ids, n), n), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found, reference(padded(item_ids, n), n), rtol=1e-10, atol=1e-10)


def test_the_bundle_is_a_copy_without_gradients_or_dropout() -> None:
    model = build(dropout=0.5)
    model.train()
    folded = fold(model)
    assert model.training
    item_ids, n = batch([24, 5], 24)
    before = encode_last(item_ids, n, folded)
    assert torch.equal(fold(model).u_table, folded.u_table)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(encode_last(item_ids, n, folded), before)
    assert not any(tensor.requires_grad for tensor in folded.tensors().values())
    assert not folded.u_table[0].any()
    assert not folded.z_table[0].any()


def test_columns_fill_whole_tiles() -> None:
    few, many = fold(build(max_len=50, theta=0.2)), fold(build(max_len=90, mask="soft"))
    assert few.basis is not None
    assert many.basis is not None
    assert few.basis.shape == (1, 50, 32)  # 21 columns
    assert many.basis.shape == (1, 90, 2 * COLUMN_TILE)


def test_half_precision_is_for_tables_and_matrices() -> None:
    folded = fold(build(gate="context", scan_norm=True, filter_placement="input")).to(dtype=torch.bfloat16)
    assert folded.dtype == torch.bfloat16
    for name, tensor in folded.tensors().items():
        small = name in ("taps", "gain", "last_weights", "A", "D", "conv_bias") or "norm" in name or "bias" in name
        assert tensor.dtype == (torch.float32 if small else torch.bfloat16), name
    item_ids, n = batch([24, 3], 24)
    assert encode_last(item_ids, n, folded).dtype == torch.bfloat16
    assert fold(build().to(torch.bfloat16)).dtype == torch.bfloat16


def test_what_cannot_be_folded_is_named() -> None:
    with pytest.raises(ValueError, match="n_layers: expected 1 .* got 2"):
        fold(build(n_layers=2))
    with pytest.raises(ValueError, match="exponentials: expected one of exact, nodes, auto, got 'fast'"):
        fold(build(), exponentials="fast")
    with pytest.raises(ValueError, match="splits: expected an integer of at least 1, got 0"):
        fold(build(), splits=0)
    wide = build()
    with torch.no_grad():
        dict(wide.named_parameters())["encoder.layers.0.mamba.A_log"][:, 0] = -9.0
    with pytest.raises(ValueError, match="nodes: expected a fit"):
        fold(wide, exponentials="nodes")
    assert not fold(wide).nodes.fits


def test_the_op_checks_its_arguments() -> None:
    folded = fold(build())
    item_ids, n = batch([24, 3], 24)
    for wrong_ids, wrong_lengths, kind, message in (
        (item_ids.double(), n, TypeError, "item_ids: expected integers, got torch.float64"),
        (item_ids[0], n, ValueError, r"item_ids: expected shape \[B, 1..24\], got \[24\]"),
        (torch.cat([item_ids, item_ids], 1), n, ValueError, r"item_ids: expected shape \[B, 1..24\], got \[2, 48\]"),
        (item_ids, n[:1], ValueError, "lengths: expected 2 integers"),
        (item_ids, n - 3, ValueError, "lengths: expected values from 1 to 24, got 0 to 21"),
        (item_ids + N_ITEMS, n, ValueError, "item_ids: expected ids from 1 to 30"),
        (padded(item_ids, torch.tensor([20, 2])), n, ValueError, "item_ids: expected ids from 1 to 30, got 0"),
        (item_ids.to("meta"), n, ValueError, "item_ids: expected device cpu"),
    ):
        with pytest.raises(kind, match=message):
            ops.encode_last(wrong_ids, wrong_lengths, folded)
    learned = dataclasses.replace(folded, D=nn.Parameter(folded.D))
    with pytest.raises(RuntimeError, match=r"no gradient; train with M2Rec.encode"):
        ops.encode_last(item_ids, n, learned)


def test_folded_model_encodes_as_the_model_does() -> None:
    model = build(gate="vector")
    folded = FoldedM2Rec(model, impl="reference")
    item_ids, n = batch([24, 1, 9], 24)
    with torch.no_grad():
        expected = model.encode(padded(item_ids, n), n)
    torch.testing.assert_close(folded.encode(item_ids, n), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded(item_ids.int(), n.int()), expected, rtol=1e-10, atol=1e-10)
    assert folded.to(dtype=torch.float32) is folded
    # float32 loses a few roundings of values of order one in each of about ten steps.
    torch.testing.assert_close(folded.encode(item_ids, n), expected.float(), rtol=1e-4, atol=1e-4)
    assert isinstance(folded.folded, Folded)
