"""Ways to run a function that was written for eager PyTorch: through torch.compile, and as a CUDA graph."""

from __future__ import annotations

import importlib.util
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NO_SEARCH = "compiled, no search"  # the mode of a row that was compiled without torch.compile's search among kernels
WARM_UPS = 3  # before a capture, as torch's own recipe has it


def cannot_compile(device: torch.device) -> str | None:
    """Why torch.compile cannot run here; None if nothing speaks against it."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "torch.compile needs a C++ compiler on a CPU, and none is installed"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on CUDA, and it is not installed"
    return None


def compiled(
    function: Callable[..., Any], device: torch.device, graphs: bool = True, search: bool = True
) -> Callable[..., Any]:
    """`function` through torch.compile, for the shapes it is first called with; on CUDA autotuned, in CUDA graphs.

    Args:
        function: has a code object of its own.
        device: where it runs.
        graphs: in CUDA graphs.
        search: autotuned: kernels of every kind are tried on the device, and their tiles one coordinate after the
            other. That takes a minute and more; without it a few seconds.

    torch.compile keeps what it made by code object, and refuses to make more than a few for one. Functions that come
    from one `def` share theirs, so each is given its own.
    """
    assert isinstance(function, types.FunctionType)
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    mode = "default"
    if device.type == "cuda":
        mode = {
            (True, True): "max-autotune", (True, False): "max-autotune-no-cudagraphs", (False, True): "reduce-overhead",
        }.get((search, graphs), mode)  # fmt: skip
    return torch.compile(own, mode=mode, fullgraph=True, dynamic=False)


def named(mode: str, device: torch.device, search: bool) -> str:
    """The mode of a row, which says so where torch.compile was not given its search. On a CPU it has none."""
    return NO_SEARCH if mode == "compiled" and device.type == "cuda" and not search else mode


class Graph:
    """`function` as a CUDA graph: captured at the first call, for its shapes; later inputs are copied into its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self._graph is None:
            self._capture(inputs)
        assert self._graph is not None
        for kept, new in zip(self._inputs, inputs, strict=True):
            kept.copy_(new)
        self._graph.replay()
        return self._outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = self._function(*self._inputs)
        self._graph = graph
