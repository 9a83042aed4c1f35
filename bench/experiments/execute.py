"""One run from its options to its record: trained, ranked, written down; or read, where that was done before."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench._results import device_name, origin, write_json
from bench.experiments import ranks
from bench.experiments.plan import Run
from fastm2rec.base import SequentialRecommender
from fastm2rec.storage import read_json
from fastm2rec.training import Inputs, RunFolder, load_inputs, train
from fastm2rec.training.inputs import reads_text
from fastm2rec.training.run import MANIFEST
from fastm2rec.training.runtime import Runtime

RECORD, RANKS, FOLDER = "record.json", "ranks.npz", "run"


class OutOfTimeError(Exception):
    """The budget is spent. What the run had reached at its last checkpoint is kept, and the next call goes on there."""


class Store:
    """Trained models and ranks, a folder a run; and the data sets, each read once.

    Args:
        folder: where runs are kept; large, and no part of the repository.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._inputs: dict[tuple[Any, bool], Inputs] = {}

    def inputs(self, run: Run) -> Inputs:
        """The data of a run."""
        with_text = reads_text(run.config)
        key = (run.config.data, with_text)
        if key not in self._inputs:
            self._inputs[key] = load_inputs(run.config.data, with_text=with_text)
        return self._inputs[key]

    def record(self, run: Run) -> dict[str, Any] | None:
        """What a finished run came to; None for one that is not finished."""
        path = self.folder / run.key / RECORD
        return read_json(path) if path.exists() else None

    def ranks(self, run: Run) -> dict[str, Any]:
        """A finished run's ranks by split, [n_users] int64."""
        return ranks.load(self.folder / run.key / RANKS)

    def model(self, run: Run) -> SequentialRecommender:
        """A finished run's model."""
        return SequentialRecommender.from_pretrained(self.folder / run.key / FOLDER / "best")

    def facts(self, run: Run) -> dict[str, Any]:
        """Sizes and fingerprint of the data that a run has read."""
        facts = read_json(self.folder / run.key / FOLDER / MANIFEST)["data"]
        return {name: value for name, value in facts.items() if name not in ("files", "text")}

    def history(self, run: Run) -> list[dict[str, Any]]:
        """The lines of a run's metrics.jsonl."""
        return RunFolder(self.folder / run.key / FOLDER).metrics()

    def make(self, run: Run, deadline: float, report: Callable[[str], None]) -> dict[str, Any]:
        """Train a run, or go on with it, and write its record.

        Args:
            run: what is trained.
            deadline: of `time.monotonic()`; looked at after every evaluation.
            report: takes a line at every evaluation.

        Raises:
            OutOfTimeError: the deadline passed.
        """

        def watch(line: str) -> None:
            report(line)
            if line.startswith("epoch") and time.monotonic() > deadline:
                raise OutOfTimeError

        folder = self.folder / run.key
        inputs = self.inputs(run)
        result = train(run.config, folder / FOLDER, resume="last", inputs=inputs, report=watch)
        device = Runtime(run.config.train.device).device
        model = self.model(run).to(device)
        found = {split: ranks.user_ranks(model, inputs.dataset, split) for split in ("valid", "test")}
        ranks.save(folder / RANKS, **found)
        history = self.history(run)
        steps = {line["step"]: line["epoch"] for line in history}
        record = {
            "key": run.key,
            "dataset": run.dataset,
            "seed": run.seed,
            "options": run.options,
            "parameters": sum(value.numel() for value in model.parameters()),
            "epochs": result.epochs,
            "best_epoch": steps[result.best_step],
            "steps": result.steps,
            "stopped_early": result.early,
            "train_seconds": round(sum(line["clock"]["train_seconds"] for line in history), 1),
            "valid": ranks.metrics(found["valid"]),
            "test": ranks.metrics(found["test"]),
            "device": device_name(device),
            **origin(),
        }
        write_json(folder / RECORD, record)
        return record
