"""`fastm2rec train`: a model on a log, into a run's folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._arguments import PROGRAM

if TYPE_CHECKING:
    from ..training import RunConfig


def run(arguments: list[str]) -> int:
    from ..training import train
    from ..training.runtime import keep_freed_memory

    keep_freed_memory()
    config, options = _parse_run(arguments)
    out = Path(options.out or Path("runs") / f"{config.data.dataset}-{config.model_name}")
    result = train(config, out, resume=options.resume)
    why = "nothing got better any more" if result.early else "all epochs are done"
    print(
        f"{why} after epoch {result.epochs}, step {result.steps}; the best model, of step {result.best_step}, has a "
        f"validation NDCG@10 of {result.best:.4f} and is in {out / 'best'}\n"
        f"its test metrics: {PROGRAM} evaluate {out}"
    )
    return 0


def _parse_run(arguments: list[str]) -> tuple[RunConfig, Any]:
    """A run from flags and YAML; which flags there are depends on the model, so that is looked for first."""
    from ..training import RunConfig
    from ..training.config import MODELS

    arguments = _underscored(arguments)
    name, preset = _model_and_preset(arguments)
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    values = _run_parser(name, preset).parse_args(arguments)
    options = {key: value for key, value in vars(values).items() if key not in ("config", "out", "resume", "preset")}
    return RunConfig.from_dict(options), values


def _underscored(arguments: Sequence[str]) -> list[str]:
    """--batch-size means --batch_size."""
    split = [argument.partition("=") for argument in arguments]
    return [
        name.replace("-", "_").replace("__", "--", 1) + equals + value
        if name.startswith("--")
        else name + equals + value
        for name, equals, value in split
    ]


def _model_and_preset(arguments: Sequence[str]) -> tuple[str, str | None]:
    """--model and --preset of a command line, or of its --config; the last word counts, as with all flags."""
    import yaml

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--model")
    finder.add_argument("--preset")
    finder.add_argument("--config", action="append", default=[])
    try:
        found, _ = finder.parse_known_args(list(arguments))
    except argparse.ArgumentError:
        return "m2rec", None  # the full parser will say what is wrong
    chosen = {"model": found.model, "preset": found.preset}
    for file in reversed(found.config):
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        if isinstance(values, dict):
            chosen = {key: values.get(key) if word is None else word for key, word in chosen.items()}
    return chosen["model"] or "m2rec", chosen["preset"]


def _run_parser(name: str, preset: str | None) -> Any:
    from jsonargparse import ArgumentParser

    from ..config import PRESETS, M2RecConfig
    from ..training.config import MODELS, DataConfig, TrainConfig

    kind = MODELS[name]
    parser = ArgumentParser(
        prog=f"{PROGRAM} train",
        usage=f"{PROGRAM} train [--config FILE] [--model NAME] [--dataset NAME] [--data DIR] [--out RUN] [options]",
        description="Train a model on a log, into a run's folder. The options of another model: --model NAME --help.",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML with any of the options below; flags that follow override it")
    add("--model", default=name, choices=list(MODELS), help="which model")
    add("--out", type=str, default=None, help="the run's folder (default: runs/DATASET-MODEL)")
    add("--resume", nargs="?", const="last", default=None, choices=["last", "previous"],
        help="go on with the run in --out, from its last checkpoint or from the one before it")  # fmt: skip
    if issubclass(kind.config, M2RecConfig):
        add("--preset", type=str, default=None, choices=list(PRESETS), help="a published setting, as defaults")
    parser.add_class_arguments(DataConfig, as_group=True)
    parser.add_class_arguments(TrainConfig, as_group=True)
    parser.add_class_arguments(kind.config, as_group=True, skip=kind.skipped)
    if preset in PRESETS and issubclass(kind.config, M2RecConfig):
        parser.set_defaults({key: value for key, value in PRESETS[preset].items() if key in kind.options})
    return parser
