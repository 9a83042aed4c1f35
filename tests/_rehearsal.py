"""A GPU that is not there: tensors on a CUDA device, without data, on which everything runs but the kernels.

torch's FakeTensors know shape, dtype and device, and refuse what a GPU refuses: tensors of two devices in one
operation. Reading a value off the device, for which the host would have to wait, raises. The launchers run; of a launch
only the arguments are looked at. What this cannot see is numbers: those are the interpreter's to check.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda:0")
ROOT = str(Path(__file__).resolve().parents[1])
aten = torch.ops.aten


class Rehearsal:
    """What ran.

    `launched` counts kernels by name, `dtypes` has those of its tensors at a kernel's last launch, and `copies` are the
    places where data went from device to device.
    """

    def __init__(self) -> None:
        self.launched: Counter[str] = Counter()
        self.dtypes: dict[str, list[torch.dtype]] = {}
        self.copies: list[str] = []
        self._mode = FakeTensorMode()

    def tensor(self, like: Tensor) -> Tensor:
        """A tensor like this one on the GPU."""
        empty = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
        return FakeTensor(self._mode, empty, DEVICE)

    def module(self, module: nn.Module) -> nn.Module:
        """The module moved to the GPU. Its parameters want no gradient: torch would need a real device for that."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(self.tensor(parameter.detach()), requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self.tensor(buffer)
        return module

    def run(self, call: Callable[[], Any]) -> Any:
        """Call it, where a GPU seems to be."""
        with torch.no_grad(), self._mode, _Operations(self), _WithoutGuards():
            return call()

    def launch(self, kernel: str, grid: Any, arguments: list[Any]) -> None:
        """Look at a launch."""
        elsewhere = {str(x.device) for x in arguments if isinstance(x, Tensor) and x.device != DEVICE}
        assert not elsewhere, f"{kernel} was given tensors on {elsewhere}"
        assert all(isinstance(size, int) and size >= 1 for size in grid), f"{kernel}: the grid is {grid}"
        self.launched[kernel] += 1
        self.dtypes[kernel] = [x.dtype for x in arguments if isinstance(x, Tensor)]


class _Operations(TorchDispatchMode):
    """Runs our ops' own functions, not what `register_fake` says, compares the two, and notes what is copied."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()
        self._rehearsal = rehearsal

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastm2rec":
            return self._ours(func, args)
        out = func(*args, **kwargs or {})
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        if len(devices) > 1:
            ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(ROOT)]
            place = next(frame for frame in reversed(ours) if frame.filename != __file__)
            self._rehearsal.copies.append(f"{func} at {place.filename}:{place.lineno}: {place.line}")
        return out

    def _ours(self, func: Any, args: tuple[Any, ...]) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        found = self._forward(func, args)
        op = OPDEFS[func._schema.name]
        if op._backward_fn is not None and op._setup_context_fn is not None:
            given = tuple(True if name == "save" else value for name, value in zip(names, args, strict=True))
            out = self._forward(func, given)
            context = _Context(given)
            op._setup_context_fn(context, given, out)
            with self, _WithoutGuards():
                grads = op._backward_fn(
                    context, *(torch.empty_like(y) for y in (out if isinstance(out, tuple) else (out,)))
                )
            for name, value, grad in zip(names, args, grads, strict=True):
                assert grad is None or (grad.shape, grad.device) == (value.shape, DEVICE), f"the gradient of {name}"
        return found

    def _forward(self, func: Any, args: tuple[Any, ...]) -> Any:
        op = OPDEFS[func._schema.name]
        assert op._abstract_fn is not None
        with self, _WithoutGuards():
            promised, found = op._abstract_fn(*args), op._init_fn(*args)
        for one, other in zip(tree_leaves(found), tree_leaves(promised), strict=True):
            assert _metadata(one) == _metadata(other), f"{func}: made and promised"
        return found


def _metadata(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, x.stride() if x.numel() else None


class _Context:
    """Autograd's `ctx`, for an op of which every gradient is wanted."""

    saved_tensors: tuple[Any, ...] = ()

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(x, Tensor) and x.is_floating_point() for x in args)

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


class WaitError(RuntimeError):
    """The host reads what a GPU has to compute first."""


_READS = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.item, Tensor.tolist)


class _WithoutGuards(TorchFunctionMode):
    """Some methods select the tensor's device first, which needs a driver; here they are made of others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], FakeTensor) and args[0].device == DEVICE:
            if func in _READS:
                raise WaitError(func.__name__)
            if func is Tensor.contiguous:
                return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
            if func is Tensor.__invert__:
                return torch.bitwise_not(args[0])
            if func is Tensor.__getitem__:
                return _part(*args)
            if func is Tensor.__setitem__:
                x, index, value = args
                part = _part(x, index)
                return part.copy_(value) if isinstance(value, Tensor) else part.fill_(value)
        return func(*args, **kwargs or {})


def _part(x: Tensor, index: Any) -> Tensor:
    """x[index]."""
    index = index if isinstance(index, tuple) else (index,)
    if any(part is ... for part in index):
        place = next(i for i, part in enumerate(index) if part is ...)
        missing = x.dim() - sum(part is not None and part is not ... for part in index)
        index = (*index[:place], *[slice(None)] * missing, *index[place + 1 :])
    axis, tensors = 0, []
    for part in index:
        if isinstance(part, int):
            x = aten.select(x, axis, part)
            continue
        if part is None:
            x = aten.unsqueeze(x, axis)
        elif isinstance(part, slice):
            x = aten.slice(x, axis, part.start, part.stop, 1 if part.step is None else part.step)
        axis += 1
        tensors.append(part if isinstance(part, Tensor) else None)
    return aten.index(x, tensors) if any(part is not None for part in tensors) else x


@contextmanager
def rehearsal() -> Iterator[Rehearsal]:
    """For as long as it lasts, torch believes that there is one GPU, of compute capability 9.0."""
    from triton.runtime.interpreter import GridExecutor

    made = Rehearsal()

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        grid = self.grid(kwargs) if callable(self.grid) else self.grid
        made.launch(self.fn.__name__, grid, [*args, *kwargs.values()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(fake_tensor, "init_gpu_context", lambda _: None)
        yield made
