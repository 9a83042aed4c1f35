"""Accuracy of trained models: a list of configurations is trained, ranked and recorded, each as it ends.

    python bench/accuracy.py bench/experiments/main.yaml --data DIR --budget-minutes 60 --work /tmp/accuracy
    python bench/accuracy.py bench/experiments/*.yaml --data DIR --record
    python bench/accuracy.py --report

DIR holds one folder for each data set (ml-100k, amazon-beauty, foursquare-nyc, ml-1m), as published or as `fastm2rec
prepare` wrote it, which is read without polars. The work folder keeps models and ranks: the same command again goes on
where the last one stopped, and a run that two experiments share is made once. What an experiment's YAML may say:
bench/experiments/plan.py. --report writes docs/experiments.md from the records.

Several processes may share the work folder, as long as no two make the same run: a run is locked while it is trained,
and whoever comes second ends with an error. Give each its own models (or --seeds), and its own --out:

    for model in "M2Rec (inner)" Mamba4Rec SASRec; do
        python bench/accuracy.py main.yaml --data DIR --work W --only "$model" --out "out/$model" --budget-minutes 9 &
    done; wait
    python bench/accuracy.py main.yaml --data DIR --work W --budget-minutes 0 --record

The last command trains nothing: it writes the record of all runs that the folder holds. Folders of several machines are
put together by copying their runs, one folder a run, into one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # from a clone, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import _experiments, _results
from bench.experiments import analyses, bootstrap
from bench.experiments.execute import OutOfTimeError, Store
from bench.experiments.plan import TEXT_FOLDER, Experiment, Run, read
from fastm2rec.data import DataError
from fastm2rec.training import RunError
from fastm2rec.training.runtime import Runtime

RECORDS = "accuracy"  # the folder of records within a device's results


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE.yaml", help="experiments, the most valuable first")
    add("--data", type=Path, metavar="DIR", help="holds one folder for each data set")
    add("--work", type=Path, default=Path("runs/accuracy"), help="keeps models and ranks (default: runs/accuracy)")
    add("--budget-minutes", type=float, default=math.inf, help="stop after so long (default: when all is done)")
    add("--seeds", type=int, nargs="+", help="make the runs of these seeds only (default: all)")
    add("--only", nargs="+", metavar="LABEL", help="make the runs of these models only, as the YAML calls them")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    add("--out", type=Path, metavar="DIR", help="write the records here (default: the folder records in --work)")
    add("--record", action="store_true", help="write the records to bench/results")
    add("--report", action="store_true", help="write docs/experiments.md from the records of bench/results")
    options = parser.parse_args(arguments)
    if not options.files and not options.report:
        parser.error("expected an experiment's YAML file, or --report")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    before = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        tables = options.work / TEXT_FOLDER
        plans = [read(path, options.data, options.device, options.threads, tables) for path in options.files]
        unknown = set(options.only or ()) - {run.label for plan in plans for run in plan.runs}
        if unknown:
            raise ValueError(f"--only: no experiment here has {', '.join(sorted(unknown))}")
        deadline = time.monotonic() + 60 * options.budget_minutes
        for plan in plans:
            carry_out(plan, Store(options.work), records_folder(options), deadline, options.seeds, options.only)
    except (OSError, ValueError, DataError, RunError) as error:
        print(f"accuracy: error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)  # of the process, which may have other work to do
    if options.report:
        print(f"written: {write_report()}")
    return 0


def carry_out(
    plan: Experiment, store: Store, out: Path, deadline: float, seeds: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Make an experiment's runs until the deadline, and keep its record up to date after each.

    Args:
        plan: the experiment.
        store: keeps its runs.
        out: the folder of its record.
        deadline: of `time.monotonic()`.
        seeds, labels: make the runs of these only; None for all.
    """
    print(f"{plan.name}: {plan.question}")
    for run in plan.runs:
        if store.record(run) is not None or (seeds is not None and run.seed not in seeds):
            continue
        if labels is not None and run.label not in labels:
            continue
        if time.monotonic() > deadline:
            break
        print(f"{run.dataset}, {run.label}, seed {run.seed} ({run.key})", flush=True)
        try:
            store.make(run, deadline, lambda line: print("  " + line, flush=True))
        except OutOfTimeError:
            print("  stopped: the budget is spent; the same command goes on from here")
            break
        _results.write_json(out / f"{plan.name}.json", record_of(plan, store))
    found = record_of(plan, store)
    found["analysis"] = analyses.analyse(plan, store)
    _results.write_json(out / f"{plan.name}.json", found)
    print("\n".join(table(found)), flush=True)


def record_of(plan: Experiment, store: Store) -> dict[str, Any]:
    """What is known of an experiment so far: its runs, those that are missing, and the comparisons over users."""
    rows, missing, data = [], [], {}
    for run in plan.runs:
        record = store.record(run)
        where = {"label": run.label, "dataset": run.dataset, "seed": run.seed}
        if record is None:
            missing.append(where)
        else:
            rows.append({"label": run.label, **record})
            data[run.dataset] = store.facts(run)
    return {
        "schema": _results.SCHEMA,
        "kind": "experiment",
        "name": plan.name,
        "question": plan.question,
        "compare_to": plan.compare_to,
        "device": _results.device_name(Runtime(plan.runs[0].config.train.device).device),
        **_results.origin(),
        "data": data,
        "runs": rows,
        "missing": missing,
        "comparisons": comparisons(plan, store),
        "analysis": {},
    }


def comparisons(plan: Experiment, store: Store) -> list[dict[str, Any]]:
    """Every model against `compare_to`, by data set, split and metric, over the seeds that both have."""
    done = [run for run in plan.runs if store.record(run) is not None]
    rows = []
    for dataset in dict.fromkeys(run.dataset for run in done):
        here: dict[str, list[Run]] = {}
        for run in done:
            if run.dataset == dataset:
                here.setdefault(run.label, []).append(run)
        base = {run.seed: store.ranks(run) for run in here.pop(plan.compare_to, [])}
        for label, runs in here.items():
            own = {run.seed: store.ranks(run) for run in runs}
            if not own.keys() & base.keys():
                continue
            for split in ("valid", "test"):
                ours, theirs = ({seed: found[split] for seed, found in side.items()} for side in (own, base))
                for metric in bootstrap.METRICS:
                    found = bootstrap.compare(ours, theirs, metric)
                    rows.append({"dataset": dataset, "label": label, "split": split, **found})
    return rows


def table(record: dict[str, Any]) -> list[str]:
    """The runs as aligned text."""
    lines = [["data set", "model", "seed", "epochs", "valid NDCG@10", "test HR@10", "test NDCG@10", "minutes"]]
    for row in record["runs"]:
        figures = [row["valid"]["NDCG@10"], row["test"]["HR@10"], row["test"]["NDCG@10"]]
        lines.append(
            [row["dataset"], row["label"], str(row["seed"]), f"{row['best_epoch']}/{row['epochs']}"]
            + [f"{value:.4f}" for value in figures]
            + [f"{row['train_seconds'] / 60:.1f}"]
        )
    text = _results.aligned(lines, left={0, 1})
    return text + [f"not run yet: {row['dataset']}, {row['label']}, seed {row['seed']}" for row in record["missing"]]


def records_folder(options: argparse.Namespace) -> Path:
    """Where the records go."""
    if options.record:
        return _results.result_path("_", Runtime(options.device).device, None, True).parent / RECORDS
    return options.out or options.work / "records"


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of experiments under a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{RECORDS}/*.json"))]


def write_report() -> Path:
    """docs/experiments.md and its figures, from the records of bench/results."""
    out = _results.ROOT / "docs" / "experiments.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text(_experiments.render(read_records(_results.ROOT / "bench" / "results"), out.parent), encoding="utf-8")
    return out


if __name__ == "__main__":
    sys.exit(main())
