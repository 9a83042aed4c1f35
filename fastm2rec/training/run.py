"""A run's folder.

    config.yaml              every option of the run; `fastm2rec train --config` takes it back
    run.json                 versions, device, threads, and the data's fingerprint
    metrics.jsonl            one line per evaluation; what the clock says is under "clock"
    best/                    the model of the best validation NDCG@10: config.json, model.safetensors, vocab.json and
                             popularity.safetensors, as `SequentialRecommender.from_pretrained` reads them
    last.safetensors         the last checkpoint, from which --resume goes on
    previous.safetensors     the one before it
    tensorboard/             scalars, if asked for

At an evaluation best/ is written first, then the line of metrics, then the checkpoint. A run killed in between resumes
from the older checkpoint, cuts metrics.jsonl back to it, and writes the same best/ and the same line again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from ..storage import PathLike, StorageError, atomic_write_bytes, atomic_write_text, read_json, write_json
from .checkpoint import LAST, PREVIOUS
from .config import RunConfig

Resume: TypeAlias = Literal["last", "previous"]

CONFIG = "config.yaml"
MANIFEST = "run.json"
METRICS = "metrics.jsonl"
BEST = "best"
TENSORBOARD = "tensorboard"
LOCK = ".lock"


class RunError(RuntimeError):
    """A run's folder that is in use, holds another run, or is not what was expected."""


class RunFolder:
    """The folder at `path`."""

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._lock: IO[bytes] | None = None

    @property
    def best(self) -> Path:
        """The folder of the best model."""
        return self.path / BEST

    def prepare(self, config: RunConfig, resume: Resume | None) -> None:
        """Claim the folder for this run.

        Args:
            config: the run.
            resume: go on with the run that is there, if one is.

        Raises:
            RunError: the folder holds another run, or this one and `resume` is None, or something else, or another
                process trains in it.
            StorageError: it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; expected a folder for the run")
        written = self.path / CONFIG
        if written.exists():
            old = self.config()
            differing = old.differences(config)
            if differing:
                was, now = old.to_dict(), config.to_dict()
                listed = ", ".join(f"{name} ({was.get(name)!r} there, {now.get(name)!r} here)" for name in differing)
                raise RunError(f"{self.path} holds a run with other options: {listed}; choose another --out")
            if resume is None:
                raise RunError(f"{self.path} already holds this run; pass --resume to go on with it, or another --out")
        elif self.path.is_dir():
            strangers = [file.name for file in self.path.iterdir() if not _is_ours(file.name)]
            if strangers:
                raise RunError(f"{self.path} is not empty and holds no run: {', '.join(sorted(strangers)[:5])}")
        self._claim()
        for leftover in (*self.path.glob(".*.partial"), *self.best.glob(".*.partial")):
            leftover.unlink()  # of a process that was killed while it wrote
        if not written.exists():
            (self.path / MANIFEST).unlink(missing_ok=True)  # of one that was killed before `record`

    def _claim(self) -> None:
        """Keep other processes out until this one ends, however it ends."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("ab")
        except OSError as error:
            raise StorageError(f"cannot write {self.path / LOCK}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.path}: another process is training in this folder") from None
        except OSError:  # a file system without locks
            return

    def record(self, config: RunConfig) -> None:
        """Write `config.yaml`: from now on the folder holds this run.

        Raises:
            StorageError: it cannot be written.
        """
        atomic_write_text(self.path / CONFIG, config.to_yaml())

    def release(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def config(self) -> RunConfig:
        """The run's options.

        Raises:
            RunError: there is no run here, or its `config.yaml` is damaged.
        """
        path = self.path / CONFIG
        try:
            return RunConfig.from_yaml(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"{self.path} holds no run: there is no {CONFIG}") from None
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: {error}") from None

    def manifest(self) -> dict[str, Any]:
        """The content of `run.json`.

        Raises:
            StorageError: it is absent or damaged.
        """
        return read_json(self.path / MANIFEST)

    def check_data(self, facts: dict[str, Any], extra: dict[str, Any]) -> None:
        """Write `run.json`, or, where it is there, refuse data other than the run's.

        Args:
            facts: what `Inputs.describe` says.
            extra: versions and the machine, for the record.

        Raises:
            RunError: other events, items or text.
        """
        if not (self.path / MANIFEST).exists():
            write_json(self.path / MANIFEST, {**extra, "data": facts})
            return
        compare_data(self, facts)

    def checkpoint(self, resume: Resume | None) -> Path | None:
        """The checkpoint to go on from; None where the run was killed before its first.

        Raises:
            RunError: `resume` is "previous", and there is none.
        """
        if resume is None:
            return None
        path = self.path / (LAST if resume == "last" else PREVIOUS)
        if path.exists():
            return path
        if resume == "previous":
            raise RunError(f"{self.path} holds no {PREVIOUS}")
        return None

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line to `metrics.jsonl`; it is on the disk when this returns.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            with (self.path / METRICS).open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"cannot write {self.path / METRICS}: {error.strerror or error}") from error

    def cut_metrics(self, lines: int) -> None:
        """Drop what was written to `metrics.jsonl` after its first `lines` lines.

        Raises:
            StorageError: it has fewer.
        """
        path = self.path / METRICS
        kept = _whole_lines(path) if path.exists() else []
        if len(kept) < lines:
            raise StorageError(f"{path}: expected at least {lines} lines, as its checkpoint says, got {len(kept)}")
        atomic_write_bytes(path, b"".join(line + b"\n" for line in kept[:lines]))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, also of a run that goes on or was killed.

        Raises:
            StorageError: it cannot be read.
        """
        path = self.path / METRICS
        try:
            return [json.loads(line) for line in _whole_lines(path)]
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot read {path}: {error}") from error


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]  # the last piece is empty, or half a line


def compare_data(folder: RunFolder, facts: dict[str, Any]) -> None:
    """Refuse data other than the run's.

    Raises:
        RunError: other events, items or text.
    """
    recorded = folder.manifest()["data"]
    if recorded["fingerprint"] != facts["fingerprint"]:
        counts = (
            f"{data['users']:,} users, {data['items']:,} items, {data['events']:,} events" for data in (recorded, facts)
        )
        raise RunError(f"{folder.path} was made from other data: {' there; '.join(counts)} here")
    then, now = recorded["text"], facts["text"]
    if (then or {}).get("digest") != (now or {}).get("digest"):
        raise RunError(
            f"{folder.path} was made with other text embeddings: {then and then['source']} there, "
            f"{now and now['source']} here"
        )


def _is_ours(name: str) -> bool:
    return name in (MANIFEST, LOCK) or (name.startswith(".") and name.endswith(".partial"))
