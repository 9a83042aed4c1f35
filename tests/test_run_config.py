"""A run's options: one flat set of names, the same after a round trip through YAML, and errors that name them."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastm2rec import M2RecConfig, SASRecConfig
from fastm2rec.cli.train import _parse_run
from fastm2rec.training import DataConfig, RunConfig, TrainConfig
from fastm2rec.training.config import CHANGEABLE, MODELS, PREFIX_BATCH, SEQUENCE_BATCH

numbers = st.floats(1e-12, 1e12)
shares = st.floats(0, 1, exclude_max=True)
counts = st.integers(1, 10**6)
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "theta": st.floats(0, 0.5, exclude_min=True, exclude_max=True),
    "tau": numbers,
    "dropout": shares,
    "mask_prob": st.floats(0, 1, exclude_min=True),
    "lr": numbers,
    "clip": numbers,
    "weight_decay": numbers,
    "n_heads": st.just(2),
    "d_model": counts.map(lambda n: 2 * n),
    # Names that YAML would take for something else.
    "dataset": st.text() | st.sampled_from(["yes", "null", "1e3", "~", "0x10"]),
    "data": st.none() | st.text() | st.sampled_from(["no", "12", "- a", "C:\\x: y #z"]),
}


def _options(model: str) -> st.SearchStrategy[dict[str, Any]]:
    """Any valid options of a run, some of them left out."""
    strategies: dict[str, st.SearchStrategy[Any]] = {}
    config = MODELS[model].config
    for part, names in (
        (DataConfig, None),
        (TrainConfig, None),
        (config, MODELS[model].options),
    ):
        hints = typing.get_type_hints(part)
        for field in dataclasses.fields(part):
            if names is not None and field.name not in names:
                continue
            hint = hints[field.name]
            if field.name in SPECIAL:
                strategies[field.name] = SPECIAL[field.name]
            elif typing.get_origin(hint) is typing.Literal:
                strategies[field.name] = st.sampled_from(typing.get_args(hint))
            elif hint is bool:
                strategies[field.name] = st.booleans()
            elif hint is str:
                strategies[field.name] = st.text(max_size=5)
            elif hint is int:
                strategies[field.name] = counts
            else:
                assert hint == int | None, field
                strategies[field.name] = st.none() | counts
    return st.fixed_dictionaries({"model": st.just(model)}, optional=strategies)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(MODELS)).flatmap(_options))
def test_yaml_brings_back_every_run(options: dict[str, Any]) -> None:
    config = RunConfig.from_dict(options)
    assert RunConfig.from_yaml(config.to_yaml()) == config
    assert RunConfig.from_dict(config.to_dict()) == config
    values = config.to_dict()
    assert all(values[name] == value for name, value in options.items() if value is not None)
    assert config.differences(config) == []


@pytest.mark.parametrize("model", list(MODELS))
def test_the_yaml_lists_every_option_once(model: str) -> None:
    config = RunConfig(model)
    written = yaml.safe_load(config.to_yaml())
    assert written == config.to_dict()
    assert RunConfig.from_dict({"model": model}) == config
    assert "n_items" not in written
    assert "text_dim" not in written


def test_mamba4rec_is_m2rec_without_filter_and_gate() -> None:
    config = RunConfig("mamba4rec")
    assert isinstance(config.model, M2RecConfig)
    assert (config.model.filter_placement, config.model.gate, config.model.is_causal) == ("none", "none", True)
    for option in ("theta", "mask", "basis", "filter_placement", "gate"):
        with pytest.raises(ValueError, match=f"^{option}: no option of a run with model=mamba4rec"):
            RunConfig.from_dict({"model": "mamba4rec", option: 0.1})
    with pytest.raises(ValueError, match="filter_placement: expected 'none' with model=mamba4rec, got"):
        RunConfig("mamba4rec", model=M2RecConfig())
    with pytest.raises(ValueError, match="model: expected a M2RecConfig, got SASRecConfig"):
        RunConfig("m2rec", model=SASRecConfig())


def test_the_batch_is_of_prefixes_or_of_whole_sequences() -> None:
    def size(model: str, **options: Any) -> int | None:
        return RunConfig.from_dict({"model": model, **options}).train.batch_size

    assert size("m2rec") == size("sasrec") == PREFIX_BATCH
    assert size("bert4rec") == size("sasrec", positions="all") == SEQUENCE_BATCH
    assert size("bert4rec", batch_size=7) == 7


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"colour": "red", "size": 3}, "^colour, size: no option of a run with model=m2rec$"),
        ({3: 4}, "^3: no option"),
        ({"model": "sasrec", "d_state": 4}, "^d_state: no option of a run with model=sasrec$"),
        ({"model": "sasrec", "mask_prob": 0.1}, "^mask_prob: no option of a run with model=sasrec$"),
        ({"n_items": 5}, "^n_items: no option"),
        ({"model": "gpt4rec"}, "^model: expected one of m2rec, mamba4rec, sasrec, bert4rec, gru4rec, got 'gpt4rec'$"),
        ({"model": ["m2rec"]}, "^model: expected one of .*, got "),
        ({"epochs": 0}, "^epochs: expected an integer of at least 1, got 0$"),
        ({"epochs": 1.5}, "^epochs: expected an integer of at least 1, got 1.5$"),
        ({"epochs": True}, "^epochs: expected an integer"),
        ({"batch_size": 0}, "^batch_size: expected an integer of at least 1, got 0$"),
        ({"micro_batch": "8"}, "^micro_batch: expected an integer of at least 1, got '8'$"),
        ({"patience": -1}, "^patience: expected an integer of at least 0, got -1$"),
        ({"lr": 0}, "^lr: expected a positive number, got 0$"),
        ({"lr": math.nan}, "^lr: expected a positive number, got nan$"),
        ({"lr": math.inf}, "^lr: expected a positive number, got inf$"),
        ({"clip": -1}, "^clip: expected a number of at least 0, got -1$"),
        ({"weight_decay": "none"}, "^weight_decay: expected a number of at least 0, got 'none'$"),
        ({"loss": "mse"}, "^loss: expected one of ce, bce, got 'mse'$"),
        ({"amp": "fp16"}, "^amp: expected one of none, bf16, got 'fp16'$"),
        ({"positions": "first"}, "^positions: expected one of last, all, got 'first'$"),
        ({"tensorboard": "no"}, "^tensorboard: expected a bool, got 'no'$"),
        ({"deterministic": 0}, "^deterministic: expected a bool, got 0$"),
        ({"dataset": 100}, "^dataset: expected a str, got 100$"),
        ({"data": 7}, "^data: expected a str, got 7$"),
        ({"user_min": -1}, "^user_min: expected an integer of at least 0, got -1$"),
        ({"theta": 0.6}, "^theta: expected cycles per sample"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[Any, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RunConfig.from_dict(options)


def test_wrong_yaml_is_named() -> None:
    with pytest.raises(ValueError, match="not valid YAML: .*line 1, column 6"):
        RunConfig.from_yaml("lr: [")
    for text, kind in (("", "NoneType"), ("- lr", "list"), ("m2rec", "str")):
        with pytest.raises(ValueError, match=f"expected a mapping of options, got {kind}"):
            RunConfig.from_yaml(text)
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        yaml.safe_load("!!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="not valid YAML: could not determine a constructor"):
        RunConfig.from_yaml("lr: !!python/object/apply:os.getcwd []")


def test_a_config_files_numbers_need_no_point(tmp_path: Path) -> None:
    text = "lr: 1e-3\nweight_decay: 5E-1\nclip: 1.e1\ntau: .2e-1\ntheta: +2e-1\ndataset: '1e3'\n"
    options = {"lr": 0.001, "weight_decay": 0.5, "clip": 10.0, "tau": 0.02, "theta": 0.2, "dataset": "1e3"}
    expected = RunConfig.from_dict(options)
    path = tmp_path / "run.yaml"
    for written in (text, expected.to_yaml()):
        path.write_text(written)
        assert RunConfig.from_yaml(written) == _parse_run(["--config", str(path)])[0] == expected
    for wrong in ("1e-3x", "e3", "1e", "0x1p3"):
        with pytest.raises(ValueError, match=f"^lr: expected a positive number, got '{wrong}'$"):
            RunConfig.from_yaml(f"lr: {wrong}")


def test_differences_are_those_that_change_a_result() -> None:
    base = RunConfig.from_dict({"model": "m2rec"})
    for name, value in {"data": "x", "threads": 3, "checkpoint_every": 9, "tensorboard": True, "epochs": 3}.items():
        assert name in CHANGEABLE
        assert base.differences(RunConfig.from_dict({"model": "m2rec", name: value})) == []
    assert base.differences(RunConfig.from_dict({"lr": 0.1, "theta": 0.2, "dataset": "ml-1m"})) == [
        "dataset", "lr", "theta",
    ]  # fmt: skip
    names = base.differences(RunConfig.from_dict({"model": "bert4rec"}))
    assert {"model", "mask_prob", "theta", "batch_size"} <= set(names)
    assert names == sorted(names)
    # Options that are hidden in one of the two are compared as absent.
    assert "theta" in base.differences(RunConfig.from_dict({"model": "mamba4rec"}))
