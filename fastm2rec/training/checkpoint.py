"""Where training stands, in one file: parameters, Adam's moments, counters. Written whole or not at all, never pickled.

Randomness needs no place in it: what is random at step s is a function of (seed, s, rank). Two files are kept, the last
checkpoint and the one before it, so that a damaged disk block does not cost the run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base import load_state
from ..storage import StorageError, load_tensors, save_tensors

LAST = "last.safetensors"
PREVIOUS = "previous.safetensors"
_MODEL, _ADAM = "model/", "adam/"


@dataclass
class Progress:
    """The counters of a run.

    Args:
        step: optimiser steps taken.
        epoch: epochs completed.
        batch: steps taken in the current epoch.
        best: best validation NDCG@10 so far; -1 before the first evaluation.
        best_step: the step of that evaluation.
        stale: evaluations since then.
        loss_sum, loss_count: sum of the training losses since the last evaluation, and of how many targets.
        lines: lines of metrics.jsonl.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float = -1.0
    best_step: int = 0
    stale: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    lines: int = 0


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, origin: Mapping[str, Any]
) -> None:
    """Make this the last checkpoint of `folder`, and the last one the previous one.

    Args:
        folder: the run's folder.
        model: its parameters and buffers are kept.
        optimizer: over the parameters of `model`, in their order.
        progress: the counters.
        origin: JSON-ready facts that `load_checkpoint` hands back, such as the number of threads.

    Raises:
        StorageError: the file was not written; both older ones are intact.
    """
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{_ADAM}{name}/{slot}": value for slot, value in optimizer.state.get(parameter, {}).items()}
    if (folder / LAST).exists():
        _keep(folder / LAST, folder / PREVIOUS)
    # Python writes a float with as many digits as bring back the same bits.
    metadata = {"progress": json.dumps(asdict(progress)), "origin": json.dumps(origin)}
    save_tensors(folder / LAST, tensors, metadata)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Progress, dict[str, Any]]:
    """Bring `model` and `optimizer` to where they were, and return the counters and `origin`.

    Raises:
        StorageError: the file is absent, truncated, or not a checkpoint of this model; if the previous checkpoint can
            be read, the message says so.
    """
    try:
        tensors, metadata = load_tensors(path)
        progress, origin = _parse(metadata, path)
        load_state(model, _part(tensors, _MODEL), path)
        _load_adam(model, optimizer, _part(tensors, _ADAM), path)
    except StorageError as error:
        raise StorageError(f"{error}{_way_out(path)}") from None
    return progress, origin


def go_back(folder: Path) -> None:
    """Make the previous checkpoint of `folder` the last one as well, so that a damaged one takes nobody's place.

    Raises:
        StorageError: it cannot be written.
    """
    _keep(folder / PREVIOUS, folder / LAST)


def read_progress(path: Path) -> Progress:
    """The counters of a checkpoint alone.

    Raises:
        StorageError: the file is absent, truncated, or not a checkpoint.
    """
    return _parse(load_tensors(path)[1], path)[0]


def _parse(metadata: Mapping[str, str], path: Path) -> tuple[Progress, dict[str, Any]]:
    try:
        values = json.loads(metadata["progress"])
        if values.keys() != {item.name for item in fields(Progress)}:
            raise ValueError(f"counters {', '.join(values)}")
        return Progress(**values), json.loads(metadata["origin"])
    except (KeyError, ValueError, AttributeError) as error:
        raise StorageError(f"{path} is not a checkpoint of a run: {error}") from None


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load_adam(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], path: Path) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    place = {name: (number, parameter) for number, (name, parameter) in enumerate(model.named_parameters())}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in place:
            raise StorageError(f"{path} has optimiser state of the unknown parameter {name}")
        number, parameter = place[name]
        if slot != "step" and tensor.shape != parameter.shape:
            raise StorageError(f"{path}: {key}: expected shape {list(parameter.shape)}, got {list(tensor.shape)}")
        state.setdefault(number, {})[slot] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _keep(source: Path, destination: Path) -> None:
    """Give `source` a second name, in one step and without copying where the file system has hard links."""
    temporary = destination.with_name(f".{destination.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, destination)
    except OSError as error:
        raise StorageError(f"cannot write {destination}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)  # still there also where both were names of one file already


def _way_out(path: Path) -> str:
    previous = path.with_name(PREVIOUS)
    if path.name == PREVIOUS:
        return ""
    try:
        step = read_progress(previous).step
    except StorageError:
        return "; there is no older checkpoint to go back to"
    return f"; the checkpoint before it, {previous.name} of step {step}, is sound: --resume previous goes on from there"
