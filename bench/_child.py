"""A command with a deadline: it and what it started are gone when the deadline, or the caller, is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0  # between asking a command to end and ending it
TAIL_BYTES = 200_000  # as much as a table of counters takes
PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: `code` is None where the deadline ended it; `tail` is the end of what it printed."""

    code: int | None
    seconds: float
    tail: str

    @property
    def status(self) -> str:
        return "timed out" if self.code is None else "done" if self.code == 0 else "failed"


class Child:
    """A running command, its output kept in a file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self._begun = time.monotonic()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `end`)
        self._process = subprocess.Popen(
            command, cwd=folder, env={"PYTHONUNBUFFERED": "1", **environment}, stdin=subprocess.DEVNULL,
            stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip

    def is_running(self) -> bool:
        return self._process.poll() is None

    def output(self) -> str:
        """Everything printed so far."""
        self._log.flush()
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")

    def end(self) -> Outcome:
        """What became of it; if it runs still, stop it."""
        code: int | None = self._process.poll()
        if code is None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(GRACE_SECONDS)
                    break
        outcome = Outcome(code, time.monotonic() - self._begun, self.output()[-TAIL_BYTES:])
        self._log.close()
        return outcome


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    seconds: float,
    meanwhile: Callable[[], object] = lambda: None,
) -> Outcome:
    """Run a command to its end or for `seconds`; `meanwhile` is called again and again."""
    child = Child(command, environment, folder)
    stop = time.monotonic() + seconds
    try:
        while child.is_running() and time.monotonic() < stop:
            time.sleep(POLL_SECONDS)
            meanwhile()
    finally:
        outcome = child.end()
    return outcome


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
