"""The command line: prepare a log, train a model, evaluate it, ask it for recommendations.

    fastm2rec prepare    --dataset ml-100k --data DIR --out FOLDER
    fastm2rec train      --dataset ml-100k --data DIR --model m2rec --out RUN
    fastm2rec evaluate   RUN
    fastm2rec recommend  RUN --history 50 181 121

The options of `train` are the fields of the dataclasses in `fastm2rec.config` and `fastm2rec.training.config`, as
flags or as YAML. A failure that a message explains is one line on stderr and exit code 1, a wrong command line 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .base import SequentialRecommender
    from .training import RunConfig, RunFolder

PROGRAM = "fastm2rec"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="|".join(COMMANDS), help="its options: COMMAND -h")
    # Only the words before a command's own are read here: a command reads the rest.
    command = parser.parse_args(arguments[:1]).command
    try:
        return COMMANDS[command](arguments[1:])
    except KeyboardInterrupt:
        print(f"{PROGRAM} {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone
        sys.stderr.close()
        return 1
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"{PROGRAM} {command}: error: {error}", file=sys.stderr)
        return 1


def _is_expected(error: Exception) -> bool:
    """Is it a failure that its message explains, rather than a bug that a traceback would?"""
    from .impl import ImplementationError
    from .storage import StorageError
    from .vocab import UnknownItemError

    if isinstance(error, ImportError):
        return error.name in ("accelerate", "jsonargparse", "polars", "pooch", "yaml")
    if isinstance(error, ValueError | OSError | StorageError | UnknownItemError | ImplementationError):
        return True
    return type(error).__name__ in ("RunError", "DivergedError")  # of fastm2rec.training, which may not be importable


def _train(arguments: list[str]) -> int:
    from .training import train

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
    from .training import RunConfig
    from .training.config import MODELS

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

    from .config import PRESETS, M2RecConfig
    from .training.config import MODELS, DataConfig, TrainConfig

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


def _evaluate(arguments: list[str]) -> int:
    from .storage import write_json
    from .training import RunFolder, evaluate, evaluate_popularity, load_inputs
    from .training.evaluate import CUTOFFS, protocol
    from .training.inputs import reads_text
    from .training.run import compare_data

    parser = argparse.ArgumentParser(
        f"{PROGRAM} evaluate", description="Rank every user's held-out item among the whole catalogue."
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run's folder; its best model is evaluated")
    add("--data", metavar="DIR", help="where the data is now (default: where it was in training)")
    add("--split", choices=["test", "valid"], default="test", help="which held-out item (default: test)")
    add("--mask-history", action="store_true", help="do not rank the items that the user already has")
    add("--batch-size", type=_positive, default=512, help="users ranked at once (default: 512)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--json", type=Path, metavar="FILE", help="write the metrics and the protocol there as well")
    options = parser.parse_args(arguments)

    folder = RunFolder(options.run)
    config = folder.config()
    model = _load_best(folder, options.device)
    data = config.data if options.data is None else type(config.data).from_dict(
        {**config.data.to_dict(), "data": options.data}
    )  # fmt: skip
    inputs = load_inputs(data, with_text=reads_text(config))
    compare_data(folder, inputs.describe())
    how: dict[str, Any] = {"mask_history": options.mask_history, "batch_size": options.batch_size}
    measured = evaluate(model, inputs.dataset, options.split, **how)
    metrics = {
        config.model_name: measured.compute(),
        "popularity": evaluate_popularity(inputs.dataset, options.split, **how).compute(),
    }
    names = [f"{name}@{k}" for k in CUTOFFS for name in ("HR", "NDCG", "MRR")]
    width = max(map(len, metrics))
    print(" " * width, *(f"{name:>8}" for name in names))
    for row, values in metrics.items():
        print(row.ljust(width), *(f"{values[name]:8.4f}" for name in names))
    said = protocol(config.data, inputs.dataset, options.split, options.mask_history, measured.n)
    print(said)
    if options.json is not None:
        write_json(options.json, {"run": str(options.run), "split": options.split, "protocol": said, **metrics})
    return 0


def _load_best(folder: RunFolder, device: str) -> SequentialRecommender:
    from .base import SequentialRecommender
    from .training import RunError
    from .training.runtime import Runtime

    if not folder.best.is_dir():
        raise RunError(f"{folder.path} holds no trained model yet: there is no {folder.best.name}/")
    return SequentialRecommender.from_pretrained(folder.best, device=Runtime(device).device)


def _recommend(arguments: list[str]) -> int:
    from .base import SequentialRecommender

    parser = argparse.ArgumentParser(
        f"{PROGRAM} recommend",
        description="The best next items for item histories, oldest item first, by the catalogue's own ids.",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a run's folder, or a folder that save_pretrained wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--history", nargs="+", metavar="ITEM", help="one history")
    source.add_argument("--file", metavar="FILE", help="a history a line, ids between spaces; - for standard input")
    add("-k", type=_positive, default=10, help="how many items (default: 10)")
    add("--include-seen", action="store_true", help="also recommend items of the history")
    add("--skip-unknown", action="store_true", help="leave out ids that are not in the catalogue")
    add("--batch-size", type=_positive, default=256, help="histories scored at once (default: 256)")
    add("--json", action="store_true", help="print one JSON list a history")
    options = parser.parse_args(arguments)

    best = options.model / "best"
    model = SequentialRecommender.from_pretrained(best if best.is_dir() else options.model)
    lines = [options.history] if options.history else _read_histories(options.file)
    whole = model.vocab is None or model.vocab.kind is int
    histories = [[_as_id(item, whole) for item in line] for line in lines]
    answers = model.recommend(
        histories,
        options.k,
        exclude_seen=not options.include_seen,
        unknown="skip" if options.skip_unknown else "error",
        batch_size=options.batch_size,
    )

    def title(item: int | str) -> str | None:
        return None if model.vocab is None else model.vocab.title(item)

    for place, answer in enumerate(answers):
        if options.json:
            print(json.dumps([{"item": item, "score": score, "title": title(item)} for item, score in answer]))
            continue
        if len(answers) > 1:
            print(f"{'' if place == 0 else chr(10)}history {place + 1}: {' '.join(map(str, histories[place][-8:]))}")
        width = max((len(str(item)) for item, _ in answer), default=0)
        for rank, (item, score) in enumerate(answer, start=1):
            print(f"{rank:3}  {item!s:>{width}}  {score:9.4f}  {title(item) or ''}".rstrip())
    return 0


def _read_histories(name: str) -> list[list[str]]:
    """The histories in a file; blank lines are passed over."""

    def split(file: IO[str]) -> list[list[str]]:
        return [line.split() for line in file if line.strip()]

    if name == "-":
        return split(sys.stdin)
    with Path(name).open(encoding="utf-8") as file:
        return split(file)


def _as_id(text: str, whole: bool) -> int | str:
    """An id as the catalogue has it; what is no number stays a string, for the error about it."""
    return int(text) if whole and text.lstrip("-").isdecimal() else text


def _prepare(arguments: list[str]) -> int:
    from .data import NAMES, TextTable, download, load_dataset, save_text_table

    parser = argparse.ArgumentParser(
        f"{PROGRAM} prepare",
        description="Bring a log into the form that training reads: k-core, order in time, dense ids. "
        "Then: train --dataset prepared --data OUT.",
    )
    add = parser.add_argument
    add("--dataset", required=True, choices=[name for name in NAMES if name != "prepared"], metavar="NAME",
        help=f"one of {', '.join(name for name in NAMES if name != 'prepared')}")  # fmt: skip
    add("--data", metavar="DIR", help="folder of its files as published, or one file")
    add("--download", action="store_true", help="fetch the publisher's file into --data first, with its checksum")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    add("--user-min", type=_count, default=5, help="k-core: events of a user, 0 keeps all (default: 5)")
    add("--item-min", type=_count, default=5, help="k-core: events of an item, 0 keeps all (default: 5)")
    add("--text", default="auto", help="auto (a file text* in --data), none, or a table of text embeddings")
    columns = parser.add_argument_group("columns of a table (--dataset table)")
    for name in ("user", "item", "timestamp", "rating"):
        columns.add_argument(f"--{name}-column", metavar="NAME")
    columns.add_argument("--no-timestamp", action="store_true", help="the file's order is the order in time")
    options = parser.parse_args(arguments)

    given = {name: getattr(options, f"{name}_column") for name in ("user", "item", "timestamp", "rating")}
    columns_given: dict[str, Any] = {name: column for name, column in given.items() if column is not None}
    if options.no_timestamp:
        columns_given["timestamp"] = None
    if columns_given and options.dataset != "table":
        parser.error(f"--dataset {options.dataset} has no columns to name; that is for --dataset table")
    if options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"{options.out} is not empty; name a new folder with --out")
    if options.download:
        if options.data is None:
            parser.error("--download: expected a folder for the file, --data DIR")
        download(options.dataset, options.data)
    loaded = load_dataset(
        options.dataset,
        options.data,
        user_min=options.user_min,
        item_min=options.item_min,
        text=options.text,
        **columns_given,
    )
    loaded.dataset.save(options.out)
    if loaded.text is not None:
        table = TextTable(loaded.dataset.vocab.items, loaded.text.table[1:])
        save_text_table(options.out / "text.safetensors", table)
    for name, value in loaded.dataset.statistics().items():
        print(f"{name.replace('_', ' '):<14} {value:,}")
    if loaded.text is not None:
        print(f"{'text':<14} {loaded.text_source}, {loaded.text.missing:,} items without")
    print(f"{'written to':<14} {options.out}")
    return 0


def _positive(text: str) -> int:
    value = _count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "recommend": _recommend,
}

if __name__ == "__main__":
    sys.exit(main())
