"""The training loop: steps, evaluations, checkpoints, and how a run that was killed goes on.

Bit-identical resumption rests on three rules. Everything random at step s is drawn after reseeding with a function of
(seed, s, rank), and the order of an epoch's samples is a function of (seed, epoch). What is written, and when, depends
on the step, never on the clock. Counters, parameters and Adam's moments are all that carries over from step to step,
and all of it is in a checkpoint.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .._version import __version__
from ..config import M2RecConfig
from ..impl import AUTO, chosen
from ..storage import PathLike
from .checkpoint import Progress, go_back, load_checkpoint, save_checkpoint
from .config import RunConfig
from .evaluate import evaluate, popularity
from .inputs import Inputs, load_inputs, make_model, reads_text
from .monitor import Monitor, watched
from .objective import Objective, make_question
from .run import PREVIOUS, Resume, RunFolder
from .runtime import Runtime, derive, settings

SELECTION = "NDCG@10"
_CPU_MICRO_BATCH = 256
# Steps between looks at the numbers that wait on a GPU; a look stops its queue.
_GPU_CHECK_EVERY = 50


class DivergedError(RuntimeError):
    """The loss or a parameter is no longer finite."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        best: validation NDCG@10 of the best model.
        best_step: its step.
        epochs, steps: how long training went on.
        early: did it stop because nothing got better any more?
    """

    best: float
    best_step: int
    epochs: int
    steps: int
    early: bool


def train(
    config: RunConfig,
    out: PathLike,
    *,
    resume: Resume | None = None,
    inputs: Inputs | None = None,
    report: Callable[[str], None] = print,
) -> TrainResult:
    """Train a model, into a run's folder.

    Args:
        config: the run.
        out: its folder; see `fastm2rec.training.run` for what is in it.
        resume: "last" goes on from the last checkpoint of the folder, or starts where there is none; "previous" from
            the one before it.
        inputs: data in memory; by default what `config.data` names is read.
        report: takes a line of text at every evaluation.

    Raises:
        RunError: a folder that holds another run, or this one and `resume` is None.
        ValueError: options that do not go together, or data without samples (`DataError`: that cannot be read).
        StorageError: a damaged checkpoint, or no space to write one; what was saved before is intact.
        DivergedError: the loss is not finite any more.
    """
    with settings(config.train.threads, config.train.deterministic), torch.random.fork_rng(devices=[]):
        if inputs is None:
            inputs = load_inputs(config.data, with_text=reads_text(config))
        model = make_model(config, inputs)
        model.popularity = popularity(inputs.dataset)
        question = make_question(config, model, inputs.dataset)
        runtime = Runtime(config.train.device)
        folder = RunFolder(out)
        try:
            if runtime.is_main:
                folder.prepare(config, resume)
                folder.check_data(inputs.describe(), _machine(runtime))
                folder.record(config)
            runtime.wait()
            return _Training(config, folder, inputs, runtime, Objective(model, question, config), report).run(resume)
        finally:
            folder.release()


class _Training:
    """A run in the making."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        inputs: Inputs,
        runtime: Runtime,
        objective: Objective,
        report: Callable[[str], None],
    ) -> None:
        self.config, self.options = config, config.train
        self.folder, self.inputs, self.runtime = folder, inputs, runtime
        self.report = report if runtime.is_main else lambda line: None
        self.model, self.question = objective.model, objective.question
        self.objective = runtime.wrap(objective)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=self.options.lr, weight_decay=self.options.weight_decay, fused=True
        )
        self.progress = Progress()
        on_cpu = runtime.device.type == "cpu"
        self.check_every = 1 if on_cpu else _GPU_CHECK_EVERY
        self.micro_batch = self.options.micro_batch or (_CPU_MICRO_BATCH if on_cpu else self.options.batch_size)
        # Kept on the device, so that a step waits for nothing.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
        self.bad_step = torch.zeros((), dtype=torch.int64, device=runtime.device)
        self.saved_step: int | None = None

    def run(self, resume: Resume | None) -> TrainResult:
        path = self.folder.checkpoint(resume)
        if path is not None:
            self._restore(path)
        if "impl" in self._origin():
            self.report(f"{self.config.model_name} on {self.runtime.device}, implementation: {self._origin()['impl']}")
        self.runtime.wait()  # nobody writes while another still reads
        if self.runtime.is_main:
            if path is not None and path.name == PREVIOUS:
                go_back(self.folder.path)
            self.folder.cut_metrics(self.progress.lines)
        progress = self.progress
        with Monitor(self.folder, self.config, self.runtime, progress.step) as self.monitor:
            while not self._stopped_early and progress.epoch < self.options.epochs:
                self._epoch()
        return TrainResult(progress.best, progress.best_step, progress.epoch, progress.step, self._stopped_early)

    @property
    def _stopped_early(self) -> bool:
        return 0 < self.options.patience <= self.progress.stale

    def _epoch(self) -> None:
        progress, options = self.progress, self.options
        self.model.train()
        order = self.question.epoch_indices(progress.epoch, options.seed)
        assert options.batch_size is not None
        batches = order.split(options.batch_size)
        done = progress.batch * options.batch_size
        with self.monitor.epoch(progress.epoch, len(order), done):
            for indices in batches[progress.batch :]:
                loss = self._step(indices)
                self.monitor.step(progress.step, len(indices), loss)
                last = progress.batch == len(batches)
                if not last and options.checkpoint_every and progress.step % options.checkpoint_every == 0:
                    self._save()
        progress.epoch, progress.batch = progress.epoch + 1, 0
        line = None
        if progress.epoch % options.eval_every == 0 or progress.epoch == options.epochs:
            line = self._evaluate()
        self._save()
        if line is not None:  # after the checkpoint: who stops the run on what it says loses nothing
            self.report(line)

    def _step(self, indices: Tensor) -> Tensor:
        """One step of Adam; the mean loss of its targets, on the device."""
        progress, options, runtime = self.progress, self.options, self.runtime
        torch.manual_seed(derive(options.seed, progress.step, runtime.rank))
        share = runtime.share(indices)
        # With fewer samples than processes, one without any takes part in the exchange of gradients, with weight 0.
        idle = not len(share)
        batch = self.question.batch(indices[:1] if idle else share)
        targets = int(runtime.total((batch[2] != 0).sum() * (not idle)))
        # The exchange averages over the processes; the gradient is to be that of the mean over the targets of all.
        scale = 0.0 if idle else runtime.processes / targets
        pieces = list(zip(*(tensor.split(self.micro_batch) for tensor in batch), strict=True))
        loss = torch.zeros((), dtype=torch.float64, device=runtime.device)
        self.optimizer.zero_grad(set_to_none=True)
        for piece in pieces[:-1]:
            with runtime.hold_gradients(self.objective):
                loss += self._backward(piece, scale)
        loss = runtime.total(loss + self._backward(pieces[-1], scale)) / runtime.processes
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        step = progress.step + 1
        self.bad_step = torch.where((self.bad_step == 0) & ~torch.isfinite(loss + norm), step, self.bad_step)
        if step % self.check_every == 0:
            self._refuse_bad_steps()
        if options.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), options.clip, norm)
        self.optimizer.step()
        progress.step, progress.batch = step, progress.batch + 1
        self.loss_sum += loss * targets
        progress.loss_count += targets
        return loss

    def _backward(self, piece: tuple[Tensor, Tensor, Tensor], scale: float) -> Tensor:
        """Add the gradients of a piece's summed loss times `scale`; that product."""
        inputs = Objective.inputs(*piece)
        loss = scale * self.objective(*map(self.runtime.place, inputs))
        loss.backward()
        return loss.detach().double()

    def _refuse_bad_steps(self) -> None:
        """Stop where the loss or a gradient of an earlier step was not finite."""
        if step := int(self.bad_step):
            gradients = {f"the gradient of {name}": value.grad for name, value in self.model.named_parameters()}
            where = _not_finite(dict(self.model.named_parameters())) or _not_finite(gradients)
            self._give_up(f"step {step}: the loss or its gradient is not finite", where)

    def _refuse_bad_weights(self) -> None:
        """Stop before numbers that are not finite get into a checkpoint."""
        self._refuse_bad_steps()
        if where := _not_finite(dict(self.model.named_parameters())):
            self._give_up(f"after step {self.progress.step}: the weights are not finite", where)

    def _give_up(self, what: str, where: str) -> NoReturn:
        kept = "no checkpoint was written before"
        if self.saved_step is not None:
            kept = f"the checkpoint of step {self.saved_step} is kept"
        raise DivergedError(
            f"{what}: NaN or infinity in {where or 'the loss'}; {kept}. A lower --lr or --clip may help"
        )

    def _evaluate(self) -> str:
        """Rank the validation items, keep the model if it is the best so far, and say so in a line."""
        progress = self.progress
        self._refuse_bad_weights()
        seconds, rate = self.monitor.clock()
        started = time.perf_counter()
        metrics = evaluate(
            self.model, self.inputs.dataset, "valid", batch_size=self.options.eval_batch, runtime=self.runtime
        ).compute()
        better = metrics[SELECTION] > progress.best
        if better:
            progress.best, progress.best_step, progress.stale = metrics[SELECTION], progress.step, 0
        else:
            progress.stale += 1
        loss = float(self.loss_sum) / progress.loss_count
        self.loss_sum.zero_()
        progress.loss_count = 0
        line = {
            "epoch": progress.epoch,
            "step": progress.step,
            "loss": loss,
            "valid": metrics,
            "best": better,
            "learned": watched(self.model),
            "clock": {
                "time": round(time.time(), 3),
                "train_seconds": round(seconds, 3),
                "samples_per_second": round(rate, 1),
                "valid_seconds": round(time.perf_counter() - started, 3),
            },
        }
        if self.runtime.is_main:
            if better:
                self.model.save_pretrained(self.folder.best)
            self.folder.append_metrics(line)
        progress.lines += 1
        self.monitor.evaluation(line)
        return (
            f"epoch {progress.epoch:>3}  step {progress.step:>6}  loss {loss:.4f}  valid "
            f"NDCG@10 {metrics['NDCG@10']:.4f}  HR@10 {metrics['HR@10']:.4f}{' *' if better else '  '}  "
            f"{rate:,.0f} samples/s"
        )

    def _save(self) -> None:
        self._refuse_bad_weights()
        progress = self.progress
        progress.loss_sum = float(self.loss_sum)
        if self.runtime.is_main:
            save_checkpoint(self.folder.path, self.model, self.optimizer, progress, self._origin())
        self.saved_step = progress.step

    def _restore(self, path: Path) -> None:
        self.progress, origin = load_checkpoint(path, self.model, self.optimizer)
        self.loss_sum.fill_(self.progress.loss_sum)
        self.saved_step = self.progress.step
        for name, now in self._origin().items():
            if origin.get(name) != now and self.runtime.is_main:
                warnings.warn(
                    f"{path} was written with {name} {origin.get(name)}, and goes on with {now}: the result may differ "
                    "in the last digits from that of an uninterrupted run",
                    stacklevel=2,
                )
        self.report(f"resuming after step {self.progress.step}, epoch {self.progress.epoch} ({path.name})")

    def _origin(self) -> dict[str, Any]:
        """What the last digits of a result depend on."""
        device = self.runtime.device
        impl = {"impl": chosen("last_scan", AUTO, device)} if isinstance(self.config.model, M2RecConfig) else {}
        return {
            **impl,
            "threads": torch.get_num_threads(),
            "processes": self.runtime.processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "torch": torch.__version__,
        }


def _not_finite(tensors: Mapping[str, Tensor | None]) -> str:
    """The names of those that hold NaN or infinity, three at most."""
    names = [name for name, value in tensors.items() if value is not None and not value.isfinite().all()]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _machine(runtime: Runtime) -> dict[str, Any]:
    return {
        "fastm2rec": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": runtime.processes,
    }
