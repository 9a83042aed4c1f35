"""What is seen of a run while it goes on: a progress bar on a terminal, TensorBoard scalars, samples per second."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..spectral import SpectralFilter
from .config import RunConfig
from .run import TENSORBOARD, RunError, RunFolder
from .runtime import Runtime

# Seconds between readings of the loss, which on a GPU stop its queue.
_REFRESH = 0.5
_SCALAR_EVERY = 50


class Monitor:
    """The watcher of one run; nothing that it does changes the run's result.

    Args:
        folder: of the run.
        config: of the run.
        runtime: the main process alone shows something.
        step: where the run goes on; scalars of later steps, from before it was killed, are dropped.

    Raises:
        RunError: TensorBoard was asked for and is not installed.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, runtime: Runtime, step: int) -> None:
        self._epochs = config.train.epochs
        self._shown = runtime.is_main and sys.stderr.isatty()
        self._writer: Any = None
        self._bar: tqdm | None = None
        self._read_at = 0.0
        self._seconds, self._samples = 0.0, 0
        if config.train.tensorboard and runtime.is_main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise RunError("tensorboard is not installed: pip install tensorboard") from None
            self._writer = SummaryWriter(str(folder.path / TENSORBOARD), purge_step=step + 1 if step else None)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    @contextlib.contextmanager
    def epoch(self, epoch: int, samples: int, done: int) -> Iterator[None]:
        """An epoch of `samples` samples, `done` of which were before this process took over."""
        started = time.perf_counter()
        title = f"epoch {epoch + 1}/{self._epochs}"
        with tqdm(
            total=samples, initial=done, desc=title, unit=" samples", unit_scale=True, leave=False,
            disable=not self._shown,
        ) as self._bar:  # fmt: skip
            yield
        self._seconds += time.perf_counter() - started

    def step(self, step: int, samples: int, loss: Tensor) -> None:
        """A step was taken, over so many samples, with this mean loss."""
        self._samples += samples
        if self._writer is not None and step % _SCALAR_EVERY == 0:
            self._writer.add_scalar("train/step_loss", float(loss), step)
        if self._bar is not None and self._shown:
            now = time.perf_counter()
            if now - self._read_at >= _REFRESH:
                self._bar.set_postfix_str(f"loss {float(loss):.4f}", refresh=False)
                self._read_at = now
            self._bar.update(samples)

    def clock(self) -> tuple[float, float]:
        """Seconds of training, and samples per second, since the last call."""
        seconds, samples = self._seconds, self._samples
        self._seconds, self._samples = 0.0, 0
        return seconds, samples / seconds if seconds else 0.0

    def evaluation(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self._writer is None:
            return
        self._writer.add_scalar("train/loss", line["loss"], line["step"])
        for name, value in line["valid"].items():
            self._writer.add_scalar(f"valid/{name}", value, line["step"])
        self._writer.add_scalar("clock/samples_per_second", line["clock"]["samples_per_second"], line["step"])
        self._writer.flush()


@torch.no_grad()
def watched(model: nn.Module) -> dict[str, float]:
    """What the gate and the filter have learned: alpha and beta (the mean of a vector), theta of each layer."""
    values = {}
    for name, module in model.named_modules():
        if isinstance(module, SpectralFilter):
            values[f"{name}.theta"] = float(module.theta)
        for scalar in ("alpha", "beta"):
            if isinstance(value := getattr(module, scalar, None), nn.Parameter):
                values[f"{name}.{scalar}"] = float(value.mean())
    return values
