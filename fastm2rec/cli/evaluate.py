"""`fastm2rec evaluate`: a trained model's metrics on the held-out items."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._arguments import PROGRAM, positive

if TYPE_CHECKING:
    from ..base import SequentialRecommender
    from ..training import RunFolder


def run(arguments: list[str]) -> int:
    from ..storage import write_json
    from ..training import RunFolder, evaluate, evaluate_popularity, load_inputs
    from ..training.evaluate import CUTOFFS, protocol
    from ..training.inputs import reads_text
    from ..training.run import compare_data

    parser = argparse.ArgumentParser(
        f"{PROGRAM} evaluate", description="Rank every user's held-out item among the whole catalogue."
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run's folder; its best model is evaluated")
    add("--data", metavar="DIR", help="where the data is now (default: where it was in training)")
    add("--split", choices=["test", "valid"], default="test", help="which held-out item (default: test)")
    add("--mask-history", action="store_true", help="do not rank the items that the user already has")
    add("--batch-size", type=positive, default=512, help="users ranked at once (default: 512)")
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
    from ..base import SequentialRecommender
    from ..training import RunError
    from ..training.runtime import Runtime

    if not folder.best.is_dir():
        raise RunError(f"{folder.path} holds no trained model yet: there is no {folder.best.name}/")
    return SequentialRecommender.from_pretrained(folder.best, device=Runtime(device).device)
