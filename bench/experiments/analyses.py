"""What is done with an experiment's trained models, by the word that its YAML says under `analysis: kind`."""

from __future__ import annotations

from typing import Any

from bench.experiments import cold_start, dynamics, noise, spectrum, ties
from bench.experiments.execute import Store
from bench.experiments.plan import Experiment

_MODULES = {"noise": noise, "cold_start": cold_start, "spectrum": spectrum, "dynamics": dynamics, "ties": ties}


def analyse(plan: Experiment, store: Store) -> dict[str, Any]:
    """The analysis of the runs that are finished; empty where the experiment has none."""
    if not plan.analysis:
        return {}
    finished = [run for run in plan.runs if store.record(run) is not None]
    return _MODULES[plan.analysis["kind"]].analyse(plan.analysis, finished, store)
