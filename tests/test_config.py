"""The dataclasses that describe a model: presets, checks, and the way through a dictionary."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastm2rec import BERT4RecConfig, M2RecConfig, SASRecConfig
from fastm2rec.config import PRESETS, GRU4RecConfig


def test_defaults_are_the_published_sizes() -> None:
    config = M2RecConfig()
    assert (config.d_model, config.d_inner, config.d_state, config.d_conv) == (64, 128, 32, 4)
    assert (config.max_len, config.theta, config.resolved_dt_rank) == (200, 0.1, 4)
    assert (config.filter_placement, config.gate, config.spectrum, config.mask) == ("inner", "scalar", "padded", "hard")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_take_overrides(name: str) -> None:
    assert M2RecConfig.preset(name, n_items=7).n_items == 7
    assert M2RecConfig.preset(name).max_len == (50 if name in ("beauty", "foursquare") else 200)


def test_paper_figure_has_the_norm_after_the_scan() -> None:
    assert M2RecConfig.preset("paper_figure").scan_norm
    assert not M2RecConfig.preset("ml1m").scan_norm


@pytest.mark.parametrize("config", [M2RecConfig(n_items=9, gate="context"), SASRecConfig(n_heads=4), BERT4RecConfig()])
def test_round_trip_through_json(config: M2RecConfig | SASRecConfig) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("theta", 0.6, "cycles per sample"),
        ("theta", -0.1, "cycles per sample"),
        ("theta", float("nan"), "cycles per sample"),
        ("max_len", 0, "at least 1"),
        ("max_len", 2.5, "an integer"),
        ("d_state", True, "an integer"),
        ("n_items", -1, "at least 0"),
        ("dropout", 1.0, r"\[0, 1\)"),
        ("tau", 0.0, "positive"),
        ("mask", "firm", "hard, soft, straight_through"),
        ("filter_placement", "outer", "inner, input, none"),
        ("gate", "Scalar", "scalar, vector, context, linear, none"),
        ("dt_rank", 0, "at least 1"),
        ("dt_rank", 4.0, "an integer"),
        ("theta", True, "cycles per sample"),
        ("scan_norm", "no", "a bool"),
        ("gate_residual", 0, "a bool"),
    ],
)
def test_a_bad_field_is_named(field: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected .*{expected}.*got {value!r}"):
        M2RecConfig(**{field: value})  # type: ignore[arg-type]


def test_a_learned_theta_cannot_start_on_the_edge() -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 0.5"):
        M2RecConfig(mask="soft", theta=0.5)
    assert M2RecConfig(mask="soft", theta=0.5, filter_placement="none").learns_theta is False


def test_unknown_fields_and_presets_are_named() -> None:
    with pytest.raises(ValueError, match="no field cutoff"):
        M2RecConfig.from_dict({"cutoff": 0.2})
    with pytest.raises(ValueError, match="ml1m, beauty, foursquare, paper_figure, got 'ml-1m'"):
        M2RecConfig.preset("ml-1m")
    with pytest.raises(ValueError, match=r"d_model: expected a multiple of n_heads \(3\), got 64"):
        SASRecConfig(n_heads=3)


@pytest.mark.parametrize("kind", [SASRecConfig, BERT4RecConfig, GRU4RecConfig])
@pytest.mark.parametrize("value", [True, 2.0, "2"])
def test_sizes_are_integers(kind: type[SASRecConfig], value: object) -> None:
    for field in dataclasses.fields(kind):
        if field.type == "int":
            with pytest.raises(ValueError, match=f"^{field.name}: expected an integer of at least .*, got {value!r}$"):
                kind(**{field.name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 1.1, True, "0.2"])
def test_mask_prob_is_a_share(value: object) -> None:
    with pytest.raises(ValueError, match=f"^mask_prob: expected a number in .*, got {value!r}$"):
        BERT4RecConfig(mask_prob=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "causal"),
    [
        (M2RecConfig(), False),
        (M2RecConfig(theta=0.5), True),
        (M2RecConfig(filter_placement="none"), True),
        (M2RecConfig(filter_placement="input", mask="soft"), False),
    ],
)
def test_only_a_filter_that_drops_something_breaks_causality(config: M2RecConfig, causal: bool) -> None:
    assert config.is_causal is causal
