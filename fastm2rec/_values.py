"""Whether a check may read the values of a tensor: on a CPU that is free, on a GPU the host waits for it.

On a GPU the caller therefore vouches for ids, lengths and offsets. Wrong ones give wrong results, but the kernels take
values in range for them (padding, or the nearest) and read nothing outside of a tensor. With FASTM2REC_CHECK=1 in the
environment they are checked there too, at the cost of a wait for every op.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

CHECK = "FASTM2REC_CHECK"


def readable(tensor: Tensor) -> bool:
    """May a check read it? Never while a graph is compiled or captured, which would break."""
    if torch.compiler.is_compiling():
        return False
    if tensor.is_cuda:
        return os.environ.get(CHECK) == "1" and not torch.cuda.is_current_stream_capturing()
    return True


def extremes(tensor: Tensor) -> tuple[int, int]:
    """The least and the greatest value. As Python's numbers: comparing tensors takes longer than finding them."""
    low, high = torch.aminmax(tensor)
    return int(low), int(high)
