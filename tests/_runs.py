"""Runs that take a tenth of a second, for the tests of training: a small log, in memory, and small models."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from fastm2rec.data import SequenceDataset, synthetic
from fastm2rec.training import Inputs, RunConfig, TrainResult, train
from fastm2rec.training.run import Resume

MODELS: dict[str, dict[str, Any]] = {
    "m2rec": {"d_state": 4, "gate": "none"},
    "mamba4rec": {"d_state": 4},
    "sasrec": {"n_layers": 1, "n_heads": 1},
    "bert4rec": {"n_layers": 1, "n_heads": 1},
    "gru4rec": {"gru_width": 8},
}


@functools.cache
def inputs(n_users: int = 24, n_items: int = 20, length: int = 10, seed: int = 0) -> Inputs:
    """Users who walk through five groups of items, one group a step."""
    made = synthetic(n_users, n_items, length, periods=(5,), noise=0.0, seed=seed, text_dim=4)
    dataset = SequenceDataset.from_log(made.log, made.items)
    assert dataset.n_items == n_items  # all occur, so that the text fits
    return Inputs(dataset, made.text, ("memory",), "memory")


def config(model: str = "sasrec", **options: Any) -> RunConfig:
    """Three steps an epoch of two epochs, one thread, unless `options` say otherwise."""
    batch = 8 if model == "bert4rec" or options.get("positions") == "all" else 60
    defaults: dict[str, Any] = {
        "max_len": 6,
        "d_model": 8,
        "epochs": 2,
        "batch_size": batch,
        "device": "cpu",
        "threads": 1,
    }
    return RunConfig.from_dict({"model": model, **defaults, **MODELS[model], **options})


def run(
    out: Path, model: str = "sasrec", *, resume: Resume | None = None, source: Inputs | None = None, **options: Any
) -> TrainResult:
    """Train in memory, in silence."""
    made = config(model, **options)
    return train(made, out, resume=resume, inputs=source or inputs(), report=lambda line: None)
