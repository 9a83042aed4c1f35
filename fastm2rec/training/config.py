"""What a run is, as data: the log, the optimisation, the model. One flat set of names for flags, YAML and Python.

The dataclasses here and in `fastm2rec.config` are the only place where options are listed: the command line takes its
flags, defaults and help from them, and `config.yaml` in a run's folder is their content.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import yaml

from .._version import __version__
from ..config import (
    BERT4RecConfig,
    GRU4RecConfig,
    M2RecConfig,
    SASRecConfig,
    _Config,
    _expect,
    _expect_int,
    _expect_type,
    _expect_word,
    _is_number,
)
from ..losses import Loss

ModelName: TypeAlias = Literal["m2rec", "mamba4rec", "sasrec", "bert4rec", "gru4rec"]
Positions: TypeAlias = Literal["last", "all"]
Amp: TypeAlias = Literal["none", "bf16"]
ModelConfig: TypeAlias = M2RecConfig | SASRecConfig | GRU4RecConfig

PREFIX_BATCH, SEQUENCE_BATCH = 2048, 128


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 and jsonargparse do; YAML 1.1, which PyYAML follows, wants 1.0e-3."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a string that `_Loader` would take for a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


@dataclass(frozen=True)
class DataConfig(_Config):
    """The log and what belongs to it.

    Args:
        dataset: name of the data set, for example ml-100k, ml-1m, amazon-beauty, foursquare-nyc, recbole, table, or
            prepared (a folder made by `fastm2rec prepare`); synthetic needs no files.
        data: folder that holds its files as published, unpacked or not.
        user_min: k-core: drop users with fewer events (0 keeps all).
        item_min: k-core: drop items with fewer events (0 keeps all).
        text: embeddings of the items' text, read by the gates scalar, vector and context. auto takes the file text* in
            the data folder, none takes none, anything else is a file (.npz, .npy, .safetensors or .parquet).
    """

    dataset: str = "synthetic"
    data: str | None = None
    user_min: int = 5
    item_min: int = 5
    text: str = "auto"

    def __post_init__(self) -> None:
        _expect_int(self, "user_min", "item_min", least=0)
        _expect_type(self, "dataset", "text", kind=str)
        if self.data is not None:
            _expect_type(self, "data", kind=str)


@dataclass(frozen=True)
class TrainConfig(_Config):
    """How the model is trained.

    Args:
        epochs: at most so many; an epoch predicts every training event about once.
        batch_size: samples of a step over all processes; by default 2048 prefixes, or 128 where a sample is a whole
            sequence (positions all, and bert4rec).
        micro_batch: samples computed at once in each process; bounds memory, does not change the step. By default all
            on a GPU, 256 on a CPU.
        lr: learning rate of Adam.
        weight_decay: L2 penalty in Adam.
        clip: largest norm of the gradient; 0 does not clip.
        loss: ce is the softmax over all items, bce the binary cross-entropy with sampled negatives.
        n_negatives: negatives of each target, for bce.
        positions: last trains on prefixes, with the loss at the last position. all trains on whole sequences with a
            loss at every position, for causal models only (sasrec, mamba4rec, gru4rec).
        prefixes_per_user: so many random prefixes of each user in an epoch; by default all of them.
        amp: bf16 runs the network in bfloat16; parameters, loss and evaluation stay in float32.
        patience: stop after so many evaluations without a better validation NDCG@10; 0 never stops early.
        eval_every: epochs from one evaluation to the next.
        eval_batch: users ranked at once.
        checkpoint_every: steps from one checkpoint to the next, besides those at every evaluation; 0 for those only.
        seed: of everything that is random. Two runs with the same options end bit-identical.
        deterministic: use deterministic kernels only; without, two runs on a GPU may differ.
        device: auto, cpu, cuda or cuda:N. Under torchrun each process takes its own GPU.
        threads: CPU threads; 0 leaves the number to torch.
        tensorboard: write TensorBoard scalars to the run's folder.
    """

    epochs: int = 100
    batch_size: int | None = None
    micro_batch: int | None = None
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    loss: Loss = "ce"
    n_negatives: int = 1
    positions: Positions = "last"
    prefixes_per_user: int | None = None
    amp: Amp = "none"
    patience: int = 10
    eval_every: int = 1
    eval_batch: int = 512
    checkpoint_every: int = 500
    seed: int = 0
    deterministic: bool = True
    device: str = "auto"
    threads: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _expect_int(self, "epochs", "eval_every", "eval_batch", "n_negatives", least=1)
        _expect_int(self, "patience", "checkpoint_every", "seed", "threads", least=0)
        for name in ("batch_size", "micro_batch", "prefixes_per_user"):
            if getattr(self, name) is not None:
                _expect_int(self, name, least=1)
        _expect(_is_number(self.lr) and 0 < self.lr < math.inf, "lr", "a positive number", self.lr)
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            _expect(_is_number(value) and value >= 0, name, "a number of at least 0", value)
        _expect_word(self, "loss", Loss)
        _expect_word(self, "positions", Positions)
        _expect_word(self, "amp", Amp)
        _expect_type(self, "deterministic", "tensorboard", kind=bool)
        _expect_type(self, "device", kind=str)


@dataclass(frozen=True)
class ModelKind:
    """A model of the command line.

    Args:
        config: the dataclass of its options.
        fixed: options that make this model out of that dataclass.
        hidden: options that have no meaning with those.
    """

    config: type[ModelConfig]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()

    @property
    def skipped(self) -> set[str]:
        """Fields of `config` that are no options: fixed, without meaning, or known from the data only."""
        return {"n_items", "text_dim", *self.fixed, *self.hidden}

    @property
    def options(self) -> list[str]:
        """The fields of `config` that are options."""
        return [item.name for item in dataclasses.fields(self.config) if item.name not in self.skipped]


MODELS: dict[str, ModelKind] = {
    "m2rec": ModelKind(M2RecConfig),
    "mamba4rec": ModelKind(
        M2RecConfig,
        {"filter_placement": "none", "gate": "none"},
        frozenset({"theta", "mask", "tau", "basis", "spectrum", "gate_residual", "text_scale"}),
    ),
    "sasrec": ModelKind(SASRecConfig),
    "bert4rec": ModelKind(BERT4RecConfig),
    "gru4rec": ModelKind(GRU4RecConfig),
}

# What may differ when a run is resumed: where things are and how they are watched, and how long training goes on.
CHANGEABLE = frozenset({"data", "threads", "checkpoint_every", "tensorboard", "epochs", "patience"})


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `model` has n_items and text_dim 0: both come from the data.

    Args:
        model_name: m2rec, mamba4rec, sasrec, bert4rec or gru4rec.
        data: the log.
        train: the optimisation.
        model: the model's options; None takes its defaults.

    Raises:
        ValueError: an unknown model, or `model` is not that model's config.
    """

    model_name: str = "m2rec"
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig | None = None

    def __post_init__(self) -> None:
        _expect(self.model_name in list(MODELS), "model", f"one of {', '.join(MODELS)}", self.model_name)
        kind = MODELS[self.model_name]
        if self.model is None:
            object.__setattr__(self, "model", kind.config.from_dict(kind.fixed))
        _expect(type(self.model) is kind.config, "model", f"a {kind.config.__name__}", self.model)
        for name, value in kind.fixed.items():
            _expect(getattr(self.model, name) == value, name, f"{value!r} with model={self.model_name}", self.model)
        if self.train.batch_size is None:
            size = SEQUENCE_BATCH if self.whole_sequences else PREFIX_BATCH
            object.__setattr__(self, "train", dataclasses.replace(self.train, batch_size=size))

    @property
    def whole_sequences(self) -> bool:
        """Is a training sample a user's whole sequence, rather than one of its prefixes?"""
        return self.model_name == "bert4rec" or self.train.positions == "all"

    def to_dict(self) -> dict[str, Any]:
        """Every option by name, in the order of the help."""
        assert self.model is not None
        options = MODELS[self.model_name].options
        return {
            "model": self.model_name,
            **self.data.to_dict(),
            **self.train.to_dict(),
            **{name: getattr(self.model, name) for name in options},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The run that `to_dict` described; options that are left out take their defaults.

        Raises:
            ValueError: an option that this model does not have, or a value out of range.
        """
        rest = dict(values)
        name = rest.pop("model", "m2rec")
        _expect(name in list(MODELS), "model", f"one of {', '.join(MODELS)}", name)
        kind = MODELS[name]
        parts = [
            {option: rest.pop(option) for option in options if option in rest}
            for options in (_names(DataConfig), _names(TrainConfig), kind.options)
        ]
        if rest:
            raise ValueError(f"{', '.join(sorted(map(str, rest)))}: no option of a run with model={name}")
        model = kind.config.from_dict({**parts[2], **kind.fixed})
        return cls(name, DataConfig.from_dict(parts[0]), TrainConfig.from_dict(parts[1]), model)

    def to_yaml(self) -> str:
        """`to_dict` as YAML that `--config` reads."""
        values = self.to_dict()
        groups = [
            ("Model", ["model", *MODELS[self.model_name].options]),
            ("Data", _names(DataConfig)),
            ("Training", _names(TrainConfig)),
        ]
        text = f"# A run of fastm2rec {__version__}. The same again: fastm2rec train --config THIS_FILE --out FOLDER\n"
        for title, names in groups:
            options = {name: values[name] for name in names}
            text += f"\n# {title}\n" + yaml.dump(options, Dumper=_Dumper, sort_keys=False)
        return text

    @classmethod
    def from_yaml(cls, text: str) -> RunConfig:
        """The run that `to_yaml` described.

        Raises:
            ValueError: not YAML, not a mapping, or as `from_dict`.
        """
        try:
            values = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"expected a mapping of options, got {type(values).__name__}")
        return cls.from_dict(values)

    def differences(self, other: RunConfig) -> list[str]:
        """The options in which two runs differ, apart from those that a resumed run may change."""
        ours, theirs = self.to_dict(), other.to_dict()
        names = (ours.keys() | theirs.keys()) - CHANGEABLE
        return sorted(name for name in names if ours.get(name) != theirs.get(name))


def _names(config: type[_Config]) -> list[str]:
    return [item.name for item in dataclasses.fields(config)]  # type: ignore[arg-type]
