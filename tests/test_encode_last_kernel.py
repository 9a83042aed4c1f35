"""The kernels from item ids to query vectors, against the specification on the same folded weights."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastm2rec import M2Rec, M2RecConfig
from fastm2rec.folded import COLUMN_TILE, Folded, fold
from fastm2rec.reference.encode_last import encode_last as reference
from tests._bounds import assert_as_good

pytest.importorskip("triton")

from fastm2rec.kernels import encode_last as module
from fastm2rec.kernels._common import interpreting
from fastm2rec.kernels.encode_last import encode_last

N_ITEMS, T = 40, 6


def build(max_len: int = 24, d_model: int = 16, **fields: Any) -> M2Rec:
    gate = fields.get("gate", "scalar")
    sizes = {"n_items": N_ITEMS, "max_len": max_len, "d_model": d_model, "d_state": 4, "theta": 0.1}
    config = M2RecConfig(**{**sizes, "text_dim": 0 if gate in ("none", "linear") else T, **fields})
    text = torch.randn(N_ITEMS + 1, T)
    text[0] = 0
    model = M2Rec(config, text if config.uses_text else None).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("theta_logit", "A_log")):  # rates stay Mamba's 1..N, which nodes fit
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(lengths: list[int], seqlen: int, device: torch.device) -> tuple[Tensor, Tensor]:
    item_ids = torch.randint(1, N_ITEMS + 1, (len(lengths), seqlen), device=device)
    n = torch.tensor(lengths, device=device)
    return item_ids.masked_fill(torch.arange(seqlen, device=device) >= n[:, None], 0), n


VARIANTS: list[dict[str, Any]] = [
    {},
    {"filter_placement": "input", "gate": "vector"},
    {"filter_placement": "none", "gate": "none"},
    {"filter_placement": "none", "stride": 2, "splits": 3},
    {"spectrum": "valid", "mask": "soft", "stride": 3, "gate": "context"},
    {"filter_placement": "input", "spectrum": "valid", "basis": "dct", "gate": "linear", "gate_residual": True},
    {"basis": "dct", "gate": "context", "gate_residual": True, "scan_norm": True, "splits": 2},
    {"d_conv": 2, "expand": 1, "dt_rank": 3, "ffn_mult": 1, "d_model": 10, "d_state": 5},
    {"d_conv": 6, "max_len": 4},
    {"max_len": 1, "splits": 2},
    {"max_len": 70, "mask": "soft", "stride": 2, "splits": 2},  # two tiles of columns: u goes through memory
    {"max_len": 70, "mask": "soft", "filter_placement": "input", "spectrum": "valid", "basis": "dct"},
]


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items()))
def test_float64_is_the_specification(fields: dict[str, Any], device: torch.device) -> None:
    """All forms of the model; only the order of sums differs, so rounding alone is allowed."""
    if not interpreting():
        pytest.skip("float64 runs in the interpreter only")
    fields = dict(fields)
    splits = fields.pop("splits", 1)
    folded = fold(build(**fields).double(), splits=splits)
    full = folded.max_len
    for seqlen in {full, (full + 1) // 2}:
        item_ids, n = batch(sorted({1, min(2, seqlen), seqlen - seqlen // 3, seqlen}), seqlen, device)
        torch.testing.assert_close(
            encode_last(item_ids, n, folded), reference(item_ids, n, folded), rtol=1e-10, atol=1e-10
        )


SIZES: list[Any] = [
    (1, [1, 1], {}),
    (7, [7, 5], {"filter_placement": "none"}),
    (50, [50, 1, 33], {}),
    (63, [63, 16], {"filter_placement": "input", "stride": 2}),
    pytest.param(200, [200, 131], {"d_model": 64, "d_state": 16}, marks=pytest.mark.slow),
    pytest.param(201, [201, 17], {"mask": "soft", "gate": "context"}, marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("exponentials", ["exact", "nodes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("seqlen", "lengths", "fields"), SIZES)
def test_loses_no_more_than_the_model_in_the_same_dtype(
    seqlen: int, lengths: list[int], fields: dict[str, Any], dtype: torch.dtype, exponentials: str, device: torch.device
) -> None:
    if exponentials == "nodes" and dtype == torch.float32:
        pytest.skip("nodes are for half precision")
    model = build(seqlen, **{"d_model": 32, "d_state": 16, **fields}).to(dtype).to(device)
    item_ids, n = batch(lengths, seqlen, device)
    with torch.no_grad():
        plain = model.encode(item_ids, n)
        exact = copy.deepcopy(model).double().encode(item_ids, n)
    folded = fold(model, exponentials=exponentials)
    got = encode_last(item_ids, n, folded)
    assert_as_good(got, plain, exact)


@pytest.mark.parametrize(("dtype", "splits"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_a_row_does_not_depend_on_its_batch_and_repeats(dtype: torch.dtype, splits: int, device: torch.device) -> None:
    folded = fold(build(50, gate="context").to(dtype).to(device), splits=splits)
    item_ids, n = batch([50, 9, 31], 50, device)
    together = encode_last(item_ids, n, folded)
    assert torch.equal(encode_last(item_ids, n, folded), together)
    for row in range(3):
        alone = encode_last(item_ids[row : row + 1], n[row : row + 1], folded)
        assert torch.equal(alone[0], together[row])
    # Behind a row's length anything may stand, and the batch may be wider or have other strides.
    wider = torch.randint(1, N_ITEMS + 1, (50, 3), device=device).t()
    wider = torch.where(torch.arange(50, device=device) < n[:, None], item_ids, wider).t().contiguous().t()
    assert torch.equal(encode_last(wider, n, folded), together)
    assert torch.equal(encode_last(item_ids[1:2, :9], n[1:2], folded)[0], together[1])
    assert encode_last(item_ids[:0], n[:0], folded).shape == (0, 16)


@pytest.mark.parametrize(
    "fields",
    [
        {"gate": "context", "spectrum": "valid", "mask": "soft"},  # spectra by length, text and gates by id
        {"filter_placement": "input"},  # z is filtered
        {"filter_placement": "none", "stride": 2, "splits": 3},
        {"max_len": 70, "mask": "soft", "gate": "vector"},  # u goes through memory
    ],
    ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items()),
)
def test_what_is_out_of_range_reads_nothing_else(fields: dict[str, Any], device: torch.device) -> None:
    sizes = {name: value for name, value in fields.items() if name != "splits"}
    folded = fold(build(**sizes).to(device), splits=fields.get("splits", 1))
    item_ids, n = batch([5, 24, 1, 7], 24, device)
    outside, padded = item_ids.clone(), item_ids.clone()
    outside[0, 0], outside[0, 4], outside[1, 3], outside[3, 6] = -1, N_ITEMS + 1, 2**40, -(2**62)
    padded[0, 0] = padded[0, 4] = padded[1, 3] = padded[3, 6] = 0
    lengths = torch.tensor([5, 2**40, -3, 7], device=device)
    assert torch.equal(encode_last(outside, lengths, folded), encode_last(padded, n, folded))


def test_exponentials_are_chosen_as_asked(device: torch.device) -> None:
    folded = fold(build(d_state=16).to(device))
    half = folded.to(dtype=torch.bfloat16)
    assert module._nodes(folded) is None
    assert module._nodes(half) is half.nodes
    assert module._nodes(dataclasses.replace(half, exponentials="exact")) is None
    with pytest.raises(ValueError, match="'nodes' needs half precision, got torch.float32"):
        encode_last(*batch([3], 24, device), dataclasses.replace(folded, exponentials="nodes"))
    many = dataclasses.replace(half.nodes, coefficients=half.nodes.coefficients.repeat(1, 4, 8))
    crowded = dataclasses.replace(half, nodes=many)
    assert module._nodes(crowded) is None
    with pytest.raises(ValueError, match="'nodes' needs coefficients that fit on the chip"):
        encode_last(*batch([3], 24, device), dataclasses.replace(crowded, exponentials="nodes"))
    bad = dataclasses.replace(half, nodes=dataclasses.replace(half.nodes, error=1.0))
    assert module._nodes(bad) is None
    with pytest.raises(ValueError, match="nodes: expected a fit"):
        encode_last(*batch([3], 24, device), dataclasses.replace(bad, exponentials="nodes"))


def test_sizes_that_no_program_holds_are_named(device: torch.device) -> None:
    assert module.MAX_COLUMNS == COLUMN_TILE
    item_ids, n = batch([3], 24, device)
    for fields, dtype, message in (
        ({"d_model": 72}, torch.float32, "d_inner: expected at most 128 in these kernels with torch.float32, got 144"),
        ({"d_model": 144}, torch.bfloat16, "d_inner: expected at most 256 in these kernels .* got 288"),
        ({"d_state": 65}, torch.bfloat16, "d_state: expected at most 64 in these kernels .* got 65"),
    ):
        sizes: dict[str, Any] = dict(fields)
        with pytest.raises(ValueError, match=message):
            encode_last(item_ids, n, fold(build(**sizes).to(device)).to(dtype=dtype))


class Module(nn.Module):
    def __init__(self, folded: Folded) -> None:
        super().__init__()
        self.folded = folded

    def forward(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        return encode_last(item_ids, lengths, self.folded)


def test_opcheck_compile_and_export(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    folded = fold(build().to(device))
    inputs = batch([24, 3], 24, device)
    expected = encode_last(*inputs, folded)
    op, calls = module._op, []

    def record(*args: Any) -> Tensor:
        calls.append(args)
        return op(*args)

    monkeypatch.setattr(module, "_op", record)
    encode_last(*inputs, folded)
    monkeypatch.undo()
    torch.library.opcheck(op, calls[0])

    compiled = torch.compile(Module(folded), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), expected)
    program = torch.export.export(Module(folded), inputs, strict=False)
    assert torch.equal(program.module()(*inputs), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("exponentials", ["exact", "nodes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("seqlen", "fields"), [(50, {}), (200, {"spectrum": "valid"}), (1024, {"stride": 2})])
def test_shipping_sizes_on_a_gpu(
    seqlen: int, fields: dict[str, Any], dtype: torch.dtype, exponentials: str, device: torch.device
) -> None:
    """Many programs at once: what the interpreter, which runs them one by one, cannot show."""
    if exponentials == "nodes" and dtype == torch.float32:
        pytest.skip("nodes are for half precision")
    model = build(seqlen, d_model=64, **{"d_state": 32, **fields}).to(dtype).to(device)
    lengths = torch.randint(1, seqlen + 1, (513,)).tolist()
    item_ids, n = batch(lengths, seqlen, device)
    folded = fold(model, exponentials=exponentials)
    got = encode_last(item_ids, n, folded)
    for _ in range(5):
        assert torch.equal(encode_last(item_ids, n, folded), got)
    plainly = copy.deepcopy(model)
    plainly.impl = "reference"  # not our own kernels, whose errors these would share
    with torch.no_grad():
        plain = plainly.encode(item_ids, n)
        exact = plainly.double().encode(item_ids, n)
    assert_as_good(got, plain, exact)


@pytest.mark.gpu
@pytest.mark.usefixtures("large_tensors")
def test_tables_beyond_32_bit_offsets_on_a_gpu(device: torch.device) -> None:
    folded = fold(build(d_model=64).to(torch.bfloat16).to(device))
    rows = (1 << 31) // 128 + N_ITEMS + 2
    grown: dict[str, Any] = {
        name: torch.cat([table.new_zeros(rows - len(table), table.shape[1]), table])
        for name in ("u_table", "z_table", "text_table")
        if (table := getattr(folded, name)) is not None
    }
    item_ids, n = batch([24, 3], 24, device)
    moved = torch.where(item_ids > 0, item_ids + rows - N_ITEMS - 1, 0)
    assert torch.equal(encode_last(moved, n, dataclasses.replace(folded, **grown)), encode_last(item_ids, n, folded))
