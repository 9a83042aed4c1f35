"""The most memory that a call holds on top of what was held before it.

CUDA's allocator counts its tensors. A CPU has no such counter: there it is the growth of the process's resident set,
whose peak Linux keeps and can set back. glibc would hide much of it, as it hands out freed memory again;
`no_reuse` makes every larger block come from the system and go back to it, so the growth is that of what lives, the
scratch of libraries included. That costs time: a process that measures memory measures no times.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from ._timing import Call

M_MMAP_THRESHOLD = -3  # of mallopt(3)
LARGE_BYTES = 1 << 16
PROCESS = Path("/proc/self")


def unavailable(device: torch.device) -> str | None:
    """Why memory cannot be measured there; None if it can."""
    if device.type == "cuda":
        return None
    if sys.platform != "linux":
        return f"the peak of the resident set is read as Linux shows it, and this is {sys.platform}"
    try:
        _forget_peak()
    except OSError as error:
        return f"{PROCESS / 'clear_refs'} cannot be written: {error.strerror}"
    return None


def no_reuse() -> None:
    """Let glibc give every block of 64 KB and more back to the system as soon as it is freed, from now on."""
    if ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES) != 1:
        raise RuntimeError("mallopt: glibc refused the threshold")


def peak_mb(call: Call, device: torch.device) -> float:
    """The peak of `call(0)` over what was held before it, in units of 2^20 bytes; `call` should be warm."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(0)
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    _forget_peak()
    before = _resident_kb("VmRSS")
    call(0)
    return max(0, _resident_kb("VmHWM") - before) / 2**10


def _forget_peak() -> None:
    (PROCESS / "clear_refs").write_text("5")


def _resident_kb(name: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"{PROCESS / 'status'} has no {name}")
