"""The engine for machines without a GPU: kernels in numba, sliced over threads.

numba is optional and slow to import; it is imported when a kernel first runs.
"""

from __future__ import annotations

import importlib.util

_HAS_NUMBA = importlib.util.find_spec("numba") is not None  # here, as torch.compile could not trace the search


def missing() -> str | None:
    """Why the engine cannot run; None if it can."""
    return None if _HAS_NUMBA else "numba is not installed (pip install 'fastm2rec[cpu]')"
