"""What an experiment is: a YAML of models, data sets and seeds, unfolded into runs. A run with the same options that
two experiments ask for is one run.

    question: what the experiment asks, in a sentence
    compare_to: label of the model that all others are compared with, user by user
    seeds: [0, 1, 2]
    options: {max_len: 50, ...}                   options of every run, named as those of `fastm2rec train`
    data:                                         the data sets, each with options of its own
      ml-100k: {prefixes_per_user: 20}
    models:                                       by label, each with options of its own, which count most
      Mamba4Rec: {model: mamba4rec, d_state: 16}
      SASRec: {model: sasrec, seeds: [0], for: {amazon-beauty: {epochs: 2}, ml-100k: null}}
    analysis: {kind: noise, ...}                  what is done with the trained models, if anything

`seeds` of a model replace those of the experiment; `for` holds its options for one data set, null leaves it out. `text`
is auto, none, or the name of a table that text_tables.py made.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastm2rec.data import load_text_table
from fastm2rec.data.log import SEQUENCES_FILE
from fastm2rec.training import RunConfig

# Where files are and how a run is watched: what its result does not depend on.
_PLACE = ("data", "threads", "checkpoint_every", "tensorboard", "device", "eval_batch")

TEXT_FOLDER = "text"  # of the text tables, in the work folder
_NO_FILE = ("auto", "none")

ANALYSES = ("noise", "cold_start", "spectrum", "dynamics", "ties")


def text_table(folder: Path, dataset: str, name: str) -> Path:
    """Where a table that text_tables.py made lies."""
    return folder / dataset / f"{name}.safetensors"


@functools.cache
def _digest(file: Path) -> str:
    table = load_text_table(file)  # not the file's header, which says where the encoder lay
    content = json.dumps(table.items).encode() + table.embeddings.numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """One training run of an experiment."""

    label: str
    dataset: str
    seed: int
    config: RunConfig

    @property
    def options(self) -> dict[str, Any]:
        """Every option but the data's place and whether it was prepared; a text table by its name and a digest."""
        options = {name: value for name, value in self.config.to_dict().items() if name != "data"}
        options["dataset"] = self.dataset
        if options["text"] not in _NO_FILE:
            file = Path(options["text"])
            options["text"] = f"{file.stem} {_digest(file)}"
        return options

    @property
    def key(self) -> str:
        """A digest of every option that the result depends on."""
        options = {name: value for name, value in self.options.items() if name not in _PLACE}
        return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Experiment:
    """A YAML file, unfolded.

    Args:
        name: the file's, without its ending.
        question: what is asked.
        compare_to: the label that the others are compared with.
        runs: in the order in which they are made: by seed, then by data set.
        analysis: what is done with the trained models; empty for nothing.
    """

    name: str
    question: str
    compare_to: str
    runs: tuple[Run, ...]
    analysis: Mapping[str, Any] = field(default_factory=dict)


def read(
    path: Path, data: Path | None = None, device: str = "auto", threads: int = 0, tables: Path | None = None
) -> Experiment:
    """The experiment in a YAML file.

    Args:
        path: the file.
        data: the folder that holds one folder for each data set, as published or as `fastm2rec prepare` wrote it (which
            then has made the k-core); the data set `synthetic` needs none.
        device, threads: where the runs are made.
        tables: the folder of the text tables; without, a run that reads one has no key.

    Raises:
        ValueError: a key that is missing or unknown, options that `RunConfig` refuses, or a text table that is not
            there; the message names the file.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected a mapping, got {type(values).__name__}")
        return _unfold(path.stem, values, data, {"device": device, "threads": threads}, tables)
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path}: {what}") from None


def _unfold(
    name: str, values: dict[str, Any], data: Path | None, place: dict[str, Any], tables: Path | None
) -> Experiment:
    known = {"question", "compare_to", "seeds", "options", "data", "models", "analysis"}
    if strangers := sorted(set(values) - known):
        raise ValueError(f"{', '.join(strangers)}: no key of an experiment; it has {', '.join(sorted(known))}")
    if values["compare_to"] not in values["models"]:
        raise ValueError(f"compare_to: expected one of {', '.join(values['models'])}, got {values['compare_to']!r}")
    analysis = values.get("analysis", {})
    if analysis and analysis.get("kind") not in ANALYSES:
        raise ValueError(f"analysis: kind: expected one of {', '.join(ANALYSES)}, got {analysis.get('kind')!r}")
    every = sorted({seed for model in values["models"].values() for seed in model.get("seeds", values["seeds"])})
    runs = []
    for seed in every:
        for dataset, of_data in values["data"].items():
            for label, model in values["models"].items():
                own = {key: value for key, value in model.items() if key not in ("seeds", "for")}
                here = model.get("for", {}).get(dataset, {})
                if here is None or seed not in model.get("seeds", values["seeds"]):
                    continue
                options = {**values.get("options", {}), **(of_data or {}), **own, **here, **place}
                if tables is not None and options.get("text", "auto") not in _NO_FILE:
                    options["text"] = str(_existing(text_table(tables, dataset, options["text"])))
                config = RunConfig.from_dict({**options, **_where(data, dataset), "seed": seed})
                runs.append(Run(label, dataset, seed, config))
    if not runs:
        raise ValueError("models, seeds, data: expected at least one run, got none")
    return Experiment(name, values["question"], values["compare_to"], tuple(runs), analysis)


def _where(data: Path | None, dataset: str) -> dict[str, str]:
    """Where a data set is, and how it is read."""
    if data is None or dataset == "synthetic":
        return {"dataset": dataset}
    folder = data / dataset
    return {"dataset": "prepared" if (folder / SEQUENCES_FILE).exists() else dataset, "data": str(folder)}


def _existing(file: Path) -> Path:
    if not file.exists():
        raise ValueError(f"text: there is no {file}; bench/experiments/text_tables.py makes it")
    return file
