"""Triton for a GPU that is not there: launches go through the whole JIT and are recorded, not executed.

The ordinary launchers run, with CPU tensors; what they launch is specialised, compiled and assembled for the
architecture asked for. It catches what the interpreter accepts and the compiler refuses. A process in which this
module has compiled something launches nothing on a real device any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


@dataclass(frozen=True)
class Compiled:
    """One specialisation of a kernel; `metadata` is Triton's: num_warps, shared, hash and the compiler's options."""

    name: str
    arch: int
    metadata: Any
    ptx: str
    cubin: bytes


class _Utils:
    """Stands for the CUDA driver's functions."""

    files: dict[str, str]

    def get_device_properties(self, device: int) -> dict[str, int]:
        # Too much shared memory is for the gates to report, with everything else, not an error here.
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        ptx = next(Path(path).read_text() for file, path in self.files.items() if file.endswith(".ptx"))
        return object(), (ptx, cubin), 0, 0, 1024


class Driver(DriverBase):
    """What Triton asks of a driver. The device's index is its architecture, as Triton keeps compiled kernels by it."""

    def __init__(self) -> None:
        super().__init__()
        self.arch = 0
        self.utils = _Utils()
        self.launched: list[Compiled] = []
        triton.knobs.runtime.kernel_load_start_hook.add(self._note_files)

    def _note_files(self, module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str) -> None:
        self.utils.files = metadata_group

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        def launch(grid_x: int, grid_y: int, grid_z: int, stream: int, function: tuple[str, bytes], *rest: Any) -> None:
            compiled = Compiled(src.fn.__name__, self.arch, metadata, *function)
            arguments = dict(zip(src.signature, rest[4:], strict=True))  # after metadata and hooks
            self.launch(compiled, (grid_x, grid_y, grid_z), arguments, src.signature)

        return launch

    def launch(
        self, compiled: Compiled, grid: tuple[int, int, int], arguments: dict[str, Any], signature: dict[str, str]
    ) -> None:
        """Note what would have run; `signature` has the arguments' types, in Triton's words."""
        self.launched.append(compiled)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Callable[..., list[float] | float]:
        def benchmark(
            call: Callable[[], object], quantiles: list[float] | None = None, **_: Any
        ) -> list[float] | float:
            call()  # an autotuned kernel is compiled with every configuration
            return 1.0 if quantiles is None else [1.0] * len(quantiles)

        return benchmark


_driver: Driver | None = None


def compiled_by(run: Callable[[], object], arch: int) -> list[Compiled]:
    """Call `run` and return what it launched, compiled for sm_`arch`: each specialisation once, in order of launch.

    Raises:
        RuntimeError: Triton's interpreter is on, which compiles nothing.
        triton.CompilationError, triton.OutOfResources, ...: whatever the compiler says.
    """
    global _driver
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: Triton's interpreter compiles nothing; unset it")
    if _driver is None:
        _driver = Driver()
    triton.runtime.driver.set_active(_driver)
    _driver.arch = arch
    _driver.launched.clear()
    run()
    return list({compiled.metadata.hash: compiled for compiled in _driver.launched}.values())
