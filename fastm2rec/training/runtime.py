"""The machine that a run has: its device, its processes, its threads, and where its randomness comes from.

One process needs plain torch only. Under torchrun or `accelerate launch`, accelerate places each process on its device
and wraps the network for the exchange of gradients; it is imported then, since that takes seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import deterministic as _deterministic

# torch serves its attribute from a module class that type checkers do not see.
_FILL = "fill_uninitialized_memory"

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


class Runtime:
    """This process among those of the run.

    Args:
        device: "auto", or a device's name.

    Raises:
        ValueError: a device that torch does not know, or that is not here.
    """

    def __init__(self, device: str = "auto") -> None:
        self.rank, self.processes = 0, 1
        self._accelerator: Any = None
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}") from None
        if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device: {device} was asked for, and torch sees {torch.cuda.device_count()} CUDA devices")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator, DistributedDataParallelKwargs

            # The only buffers are frozen text tables: the same everywhere, and large.
            handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
            self._accelerator = Accelerator(cpu=self.device.type == "cpu", kwargs_handlers=handlers)
            self.device = self._accelerator.device
            self.rank, self.processes = self._accelerator.process_index, self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Is this the process that writes?"""
        return self.rank == 0

    def share(self, indices: Tensor) -> Tensor:
        """This process's part of a batch."""
        return indices[self.rank :: self.processes]

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor of the host on the device. A GPU fetches it when its queue comes to that."""
        # From memory that is not pinned a copy would first wait for all that is queued.
        tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return tensor.to(self.device, non_blocking=True)

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` on the device, such that gradients are averaged over the processes in `backward`."""
        module.to(self.device)
        return module if self._accelerator is None else self._accelerator.prepare_model(module)

    def hold_gradients(self, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Backward passes inside do not exchange gradients; the next one outside does."""
        return contextlib.nullcontext() if self._accelerator is None else self._accelerator.no_sync(module)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return tensor if self._accelerator is None else self._accelerator.reduce(tensor.to(self.device), "sum")

    def wait(self) -> None:
        """Until every process is here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


def keep_freed_memory() -> None:
    """Have the C library keep what this process frees; a process that only trains wants that.

    Every step makes the same large tensors again. By default glibc gives them back to the system and fetches them anew,
    page by page: at 256 x 200 that took an eighth of a step. Does nothing where the library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, 2**25)  # the most it takes
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def derive(*parts: int | str) -> int:
    """A seed that is a function of `parts` alone, 63 bits."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


@contextlib.contextmanager
def settings(threads: int, deterministic: bool) -> Iterator[None]:
    """Torch's global switches for the time of a run; they are put back afterwards.

    Args:
        threads: CPU threads; 0 leaves them.
        deterministic: raise where an operation has no deterministic kernel.
    """
    before = torch.get_num_threads()
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark, fill = torch.backends.cudnn.benchmark, getattr(_deterministic, _FILL)
    try:
        if threads:
            torch.set_num_threads(threads)
        if deterministic:
            # cuBLAS is deterministic with a workspace of its own only, and reads this when it starts.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
            setattr(_deterministic, _FILL, False)  # a debugging aid, and it takes time
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        setattr(_deterministic, _FILL, fill)
