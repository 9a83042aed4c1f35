"""What is said of a call that failed, and whether the process can go on after it.

After an illegal access, and some other errors, every later call to CUDA fails in this process: its GPU is lost. The row
that did it says so, those that wait are left for a process of their own, and this one ends.
"""

from __future__ import annotations

import traceback
from typing import NoReturn

import torch

LOST = "lost the GPU: "  # begins the reason of the row that did it: it is not tried again
WAITING = (
    "not measured: another row lost the GPU that both used"  # the reason of the others: a new process measures them
)
EXIT_CODE = 3
MOST_CHARACTERS = 300  # of a line


class LostError(RuntimeError):
    """The GPU is lost; the row that did it says so."""


def reason(error: BaseException) -> str:
    """An exception in a line: how its message begins and how it ends, as a compiler's cause comes last."""
    lines = [line.strip()[:MOST_CHARACTERS] for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' ... '.join([*lines[:1], *lines[1:][-1:]])}" if lines else type(error).__name__


def report(error: BaseException) -> str:
    """As `reason`; the whole of it goes to stderr."""
    traceback.print_exception(error)
    return reason(error)


def is_lost(device: torch.device) -> bool:
    """Does every call fail from now on? An error that was only late in being noticed is gone when it has been seen."""
    if device.type != "cuda":
        return False
    for _ in range(2):
        try:
            torch.cuda.synchronize(device)
        except Exception:
            continue
        return False
    return True


def told(error: BaseException, device: torch.device) -> str:
    """`report`, for a call on `device`: begins with `LOST` where the device did not outlive it."""
    text = report(error)
    return LOST + text if is_lost(device) else text


def concerns(skipped: str | None) -> bool:
    """Is it the reason of a row that lost its GPU, or had it lost?"""
    return skipped is not None and skipped.startswith((LOST, WAITING))


def end() -> NoReturn:
    """End a process that has lost its GPU, after its rows were written."""
    print(f"the GPU is lost to this process: exit code {EXIT_CODE}", flush=True)
    raise SystemExit(EXIT_CODE)
