"""M2Rec and its encoder against the specification, and what a user relies on: padding, batches, files, gradients."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastm2rec import M2Rec, M2RecConfig, M2RecEncoder, StorageError, Vocabulary
from fastm2rec.base import SequentialRecommender, build_model
from fastm2rec.model import roll_rows
from fastm2rec.reference.m2rec import M2Rec as ReferenceM2Rec
from fastm2rec.reference.mamba4rec import Mamba4Rec as ReferenceMamba4Rec

N_ITEMS, MAX_LEN, T = 30, 24, 5


def config(**fields: Any) -> M2RecConfig:
    sizes = {"n_items": N_ITEMS, "max_len": MAX_LEN, "d_model": 16, "d_state": 4, "text_dim": T, "theta": 0.15}
    return M2RecConfig(**{**sizes, **fields})


def text_for(config: M2RecConfig) -> Tensor | None:
    if not config.uses_text:
        return None
    table = torch.randn(N_ITEMS + 1, T)
    table[0] = 0
    table[7] = 0  # an item without text
    return table


def build(**fields: Any) -> M2Rec:
    made = config(**fields)
    model = M2Rec(made, text_for(made)).double().eval()
    with torch.no_grad():  # start values are small and symmetric: errors would hide in them
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch(lengths: list[int], seqlen: int = MAX_LEN) -> tuple[Tensor, Tensor]:
    item_ids = torch.randint(1, N_ITEMS + 1, (len(lengths), seqlen))
    n = torch.tensor(lengths)
    return item_ids.masked_fill(torch.arange(seqlen) >= n[:, None], 0), n


VARIANTS: list[dict[str, Any]] = [
    {},
    {"filter_placement": "input"},
    {"filter_placement": "none"},
    {"mask": "soft", "spectrum": "valid"},
    {"mask": "straight_through", "basis": "dct", "filter_placement": "input"},
    {"spectrum": "valid", "basis": "dct", "stride": 2},
    {"stride": 3, "n_layers": 2},
    {"stride": 5, "filter_placement": "none", "gate": "none"},
    {"n_layers": 2, "gate": "vector"},
    {"gate": "context", "gate_residual": True},
    {"gate": "linear", "gate_residual": True, "scan_norm": True, "text_dim": 0},
    {"scan_norm": True, "text_scale": "none", "dt_rank": 3, "d_conv": 2, "expand": 1},
    {"theta": 0.5},
    {"theta": 0.0, "spectrum": "valid"},
]


def _identify(fields: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in fields.items()) or "default"


@pytest.mark.parametrize("fields", VARIANTS, ids=_identify)
def test_output_and_gradients_are_the_specifications(fields: dict[str, Any]) -> None:
    model = build(**fields)
    reference = ReferenceM2Rec(model.config, text_for(model.config)).double().eval()
    reference.load_state_dict(model.state_dict())
    item_ids, lengths = batch([MAX_LEN, 1, 2, 7, 13, 23])
    expected = reference(item_ids, lengths)
    actual = model(item_ids, lengths)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-7, atol=1e-9, msg=name)
        assert name.startswith("item_embedding") or parameter.grad.any(), f"{name} has no influence"


@pytest.mark.parametrize("put", ["hook", "subclass"])
def test_what_is_put_on_the_embedding_counts(put: str) -> None:
    """The fused lookup steps back for a hook, or for another module, that makes the vectors."""
    model = build(d_model=32)
    item_ids, lengths = batch([MAX_LEN, 1, 7])
    table = model.item_embedding.weight
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        doubled.item_embedding.weight.copy_(2 * table + 1)
    if put == "hook":
        model.item_embedding.register_forward_hook(lambda module, inputs, e: 2 * e + 1)
    else:

        class Other(torch.nn.Embedding):
            def forward(self, ids: Tensor) -> Tensor:
                return 2 * super().forward(ids) + 1

        model.item_embedding = Other.from_pretrained(table.detach(), freeze=False)
    expected, actual = (one(item_ids, lengths) for one in (doubled, model))
    torch.testing.assert_close(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    wanted = doubled.item_embedding.weight.grad
    assert wanted is not None
    torch.testing.assert_close(model.item_embedding.weight.grad, 2 * wanted)


@pytest.mark.parametrize("fields", [f for f in VARIANTS if f.get("stride", 1) == 1], ids=_identify)
def test_hidden_holds_encode_at_the_last_position(fields: dict[str, Any]) -> None:
    model = build(**fields)
    item_ids, lengths = batch([MAX_LEN, 1, 2, 7, 13, 23])
    hidden = model.hidden(item_ids, lengths)
    assert hidden.shape == (6, MAX_LEN, 16)
    torch.testing.assert_close(
        hidden[torch.arange(6), lengths - 1], model.encode(item_ids, lengths), rtol=1e-9, atol=1e-9
    )


def test_without_filter_and_gate_it_is_mamba4rec() -> None:
    model = build(filter_placement="none", gate="none", n_layers=2)
    reference = ReferenceMamba4Rec(model.config).double().eval()
    reference.load_state_dict({name: value for name, value in model.state_dict().items() if name != "text"})
    item_ids, lengths = batch([MAX_LEN, 1, 11])
    torch.testing.assert_close(model(item_ids, lengths), reference(item_ids, lengths), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fields", VARIANTS, ids=_identify)
def test_a_row_does_not_depend_on_its_batch(fields: dict[str, Any]) -> None:
    model = build(**fields)
    item_ids, lengths = batch([MAX_LEN, 1, 2, 7, 13, 23])
    together = model.score(model(item_ids, lengths))
    for row in range(len(lengths)):
        alone = model.score(model(item_ids[row : row + 1], lengths[row : row + 1]))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fields", VARIANTS, ids=_identify)
def test_a_row_does_not_depend_on_the_width_it_arrives_in(fields: dict[str, Any]) -> None:
    """With the valid spectrum nothing else is read; with the padded one the model itself pads to max_len."""
    model = build(**fields)
    item_ids, lengths = batch([9, 4, 1])
    wide = model.score(model(item_ids, lengths))
    narrow = model.score(model(item_ids[:, :9], lengths))
    torch.testing.assert_close(narrow, wide, rtol=1e-10, atol=1e-10)


def test_valid_spectrum_does_not_depend_on_max_len_and_padded_does() -> None:
    for spectrum, same in (("valid", True), ("padded", False)):
        model = build(spectrum=spectrum)
        other = M2Rec(config(spectrum=spectrum, max_len=2 * MAX_LEN), text_for(model.config)).double().eval()
        other.load_state_dict(model.state_dict())
        item_ids, lengths = batch([9, 4, 1])
        assert torch.allclose(model(item_ids, lengths), other(item_ids, lengths), rtol=1e-9, atol=1e-9) is same


def test_the_filter_sees_the_future_and_mamba4rec_does_not() -> None:
    for fields, leaks in (({}, True), ({"filter_placement": "none"}, False)):
        model = build(**fields)
        assert model.is_causal is not leaks
        item_ids, lengths = batch([20])
        changed = item_ids.clone()
        changed[0, 15:20] = torch.tensor([1, 2, 3, 4, 5])
        before, after = model.hidden(item_ids, lengths)[0, :15], model.hidden(changed, lengths)[0, :15]
        assert torch.equal(before, after) is not leaks


@pytest.mark.parametrize(("output", "spectrum"), list(itertools.product(["all", "last"], ["padded", "valid"])))
def test_padding_side_and_mask_give_equal_results(output: Any, spectrum: Any) -> None:
    encoder = M2RecEncoder(config(spectrum=spectrum, n_layers=2)).double().eval()
    x = torch.randn(4, 17, 16, dtype=torch.float64)
    lengths = torch.tensor([17, 1, 8, 16])
    right = encoder(x, lengths, output=output)
    mask = torch.arange(17) >= lengths[:, None]
    assert torch.equal(encoder(x, key_padding_mask=mask, output=output), right)

    # The same rows, items at the right end, with garbage in the padding.
    left = roll_rows(x, 17 - lengths)
    garbage = torch.where(mask.flip(1)[..., None], torch.full_like(x, 1e6), left)
    for arguments in ({"lengths": lengths}, {"key_padding_mask": mask.flip(1)}):
        result = encoder(garbage, padding_side="left", output=output, **arguments)
        expected = right if output == "last" else roll_rows(right, 17 - lengths)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    if output == "all":
        assert not right[mask].any()


def test_encoder_takes_fields_and_full_rows_by_default() -> None:
    encoder = M2RecEncoder(d_model=8, d_state=2, max_len=6).eval()
    x = torch.randn(2, 6, 8)
    assert torch.equal(encoder(x), encoder(x, torch.tensor([6, 6])))
    assert encoder(x, output="last").shape == (2, 8)
    with pytest.raises(ValueError, match="no field d_modle"):
        M2RecEncoder(d_modle=8)


def test_encoder_refuses_what_it_cannot_read() -> None:
    encoder = M2RecEncoder(d_model=8, d_state=2)
    x = torch.randn(2, 6, 8)
    full = torch.zeros(2, 6, dtype=torch.bool)
    for arguments, error, message in (
        ({"lengths": torch.tensor([7, 1])}, ValueError, "lengths: expected values from 1 to 6, got 7"),
        ({"lengths": torch.tensor([0, 1])}, ValueError, "lengths: expected values from 1 to 6, got 0"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths: expected shape \[2\], got \[1\]"),
        ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths: expected integers, got torch.float32"),
        ({"lengths": torch.tensor([1, 2]), "key_padding_mask": full}, ValueError, "key_padding_mask: expected None"),
        ({"key_padding_mask": full[:, :5]}, ValueError, r"key_padding_mask: expected shape \[2, 6\], got \[2, 5\]"),
        ({"key_padding_mask": full.int()}, TypeError, "key_padding_mask: expected bool"),
        ({"key_padding_mask": full.index_fill(1, torch.tensor(0), True)}, ValueError, "one block on the right"),
        ({"padding_side": "top"}, ValueError, "padding_side: expected 'right' or 'left', got 'top'"),
        ({"output": "first"}, ValueError, "output: expected 'all' or 'last', got 'first'"),
    ):
        with pytest.raises(error, match=message):
            encoder(x, **arguments)
    with pytest.raises(ValueError, match=r"x: expected shape \[B, L, 8\] with L >= 1, got \[2, 6, 9\]"):
        encoder(torch.randn(2, 6, 9))
    with pytest.raises(TypeError, match="x: expected floating-point"):
        encoder(x.long())
    with pytest.raises(ValueError, match="output: expected 'last' with stride=2"):
        M2RecEncoder(d_model=8, d_state=2, stride=2)(x)


def test_model_refuses_what_it_cannot_read() -> None:
    model = build()
    item_ids, lengths = batch([5, 3])
    model(item_ids.int(), lengths.int())
    for ids, n, error, message in (
        (
            item_ids.index_fill(1, torch.tensor(0), 31),
            lengths,
            ValueError,
            r"ids from 1 to 30 \(0 is padding\), got 31",
        ),
        (item_ids.index_fill(1, torch.tensor(0), -1), lengths, ValueError, "got -1"),
        (item_ids.index_fill(1, torch.tensor(1), 0), lengths, ValueError, r"first lengths\[0\] slots of row 0"),
        (item_ids.float(), lengths, TypeError, "item_ids: expected integers, got torch.float32"),
        (item_ids[0], lengths, ValueError, r"item_ids: expected shape \[B, 1..24\], got \[24\]"),
        (torch.ones(2, 25).long(), lengths, ValueError, r"item_ids: expected shape \[B, 1..24\], got \[2, 25\]"),
        (item_ids, torch.tensor([0, 3]), ValueError, "lengths: expected values from 1 to 24, got 0"),
        (item_ids, torch.tensor([25, 3]), ValueError, "lengths: expected values from 1 to 24, got 25"),
    ):
        with pytest.raises(error, match=message):
            model(ids, n)


@pytest.mark.parametrize(
    ("fields", "text", "message"),
    [
        ({}, None, r"text: expected a table of shape \[31, 5\] with gate='scalar', got None"),
        ({}, torch.zeros(30, T), r"shape \[n_items \+ 1, text_dim\] = \[31, 5\], got torch.float32 of shape \[30, 5\]"),
        ({}, torch.zeros(31, T, dtype=torch.long), "expected a floating-point table"),
        ({}, torch.full((31, T), torch.nan), "expected finite values"),
        ({}, torch.ones(31, T), "row 0, which stands for padding, to be zero"),
        ({"text_dim": 0}, None, "text_dim: expected at least 1 with gate='scalar', got 0"),
        ({"gate": "none"}, torch.zeros(31, T), "text: expected None with gate='none'"),
        ({"n_items": 0}, None, "n_items: expected at least 1, got 0"),
    ],
)
def test_a_text_table_that_does_not_fit(fields: dict[str, Any], text: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M2Rec(config(**fields), text)


def test_start_values() -> None:
    model = M2Rec(config(d_model=64), text_for(config()))
    state = model.state_dict()
    for name in ("encoder.layers.0.mamba.dt_proj.weight", "encoder.layers.0.ffn.fc1.weight", "item_embedding.weight"):
        assert 0.017 < state[name].std() < 0.023, name
    assert not state["encoder.layers.0.mamba.dt_proj.bias"].any()
    assert float(state["fusion.alpha"]) == float(state["fusion.beta"]) == 0.5
    torch.testing.assert_close(state["encoder.layers.0.mamba.A_log"][5].exp(), torch.arange(1.0, 5.0))
    own = M2Rec(config(d_model=64, init="mamba"), text_for(config()))
    step = torch.nn.functional.softplus(own.state_dict()["encoder.layers.0.mamba.dt_proj.bias"])
    assert 1e-4 <= step.min() <= step.max() <= 0.11, "Mamba's own step sizes lie between 0.001 and 0.1"


@pytest.mark.parametrize("fields", VARIANTS, ids=_identify)
def test_saved_and_loaded_it_gives_the_same(fields: dict[str, Any], tmp_path: Path) -> None:
    model = build(**fields).float()
    model.vocab = Vocabulary([f"item{i}" for i in range(N_ITEMS)])
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    for kind in (M2Rec, SequentialRecommender):
        loaded = kind.from_pretrained(tmp_path)
        assert not loaded.training
        assert loaded.config == model.config
        assert loaded.vocab == model.vocab
        item_ids, lengths = batch([5, 24])
        assert torch.equal(loaded(item_ids, lengths), model(item_ids, lengths))


@pytest.mark.parametrize("model_type", ["sasrec", "bert4rec"])
def test_baselines_are_recommenders_too(model_type: str, tmp_path: Path) -> None:
    model = build_model(model_type, {"n_items": N_ITEMS, "max_len": 12, "d_model": 16}).eval()
    item_ids, lengths = batch([5, 12], 12)
    query = model(item_ids, lengths)
    assert query.shape == (2, 16)
    assert model.score(query).shape == (2, N_ITEMS + 1)
    model.save_pretrained(tmp_path)
    loaded = SequentialRecommender.from_pretrained(tmp_path)
    assert torch.equal(loaded(item_ids, lengths), query)
    with pytest.raises(StorageError, match=f"holds a {model_type} model, not a M2Rec"):
        M2Rec.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lengths: expected values from 1 to 12, got 13"):
        model(item_ids, torch.tensor([13, 1]))


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    model = build().float()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    saved = {path.name: path.read_bytes() for path in folder.iterdir()}

    with pytest.raises(StorageError, match="config.json belongs to another model; save to an empty folder"):
        build(d_state=5).float().save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == saved

    def broken(name: str, data: bytes | None, message: str) -> None:
        for file, content in saved.items():
            (folder / file).write_bytes(content)
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)
        with pytest.raises(StorageError, match=message):
            M2Rec.from_pretrained(folder)

    broken("model.safetensors", saved["model.safetensors"][:-100], "truncated")
    broken("model.safetensors", None, "model.safetensors: no such file")
    broken("config.json", None, "cannot read .*config.json")
    broken("config.json", b"[]", "was not saved with this config.json")
    broken("config.json", saved["config.json"].replace(b'"theta": 0.15', b'"theta": 0.2'), "was not saved with this")
    with pytest.raises(StorageError, match="cannot read .*nowhere"):
        M2Rec.from_pretrained(tmp_path / "nowhere")


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    model = build().float()
    with torch.no_grad():
        model.fusion.linear.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(StorageError, match=r"fusion.linear.weight holds NaN or infinity"):
        M2Rec.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="scores are NaN"):
        model.recommend([[1]], k=1)


def test_bfloat16_loses_no_more_than_bfloat16() -> None:
    """The error of a bfloat16 model against float64 stays within a few roundings of its inputs."""
    model = build()
    item_ids, lengths = batch([MAX_LEN, 1, 13])
    exact = model(item_ids, lengths)
    low = model.bfloat16()(item_ids, lengths)
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).norm() / exact.norm() < 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.slow
def test_it_compiles_without_a_break() -> None:
    for spectrum in ("padded", "valid"):
        model = build(spectrum=spectrum, stride=2).float()
        item_ids, lengths = batch([MAX_LEN, 1, 13])
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(item_ids, lengths), model(item_ids, lengths), rtol=1e-4, atol=1e-5)
