"""Functions that only borrow their arrays."""

from __future__ import annotations

from typing import Any

from numba import njit

# numba counts references to every array of every call, atomically: a call with twenty arrays costs 150 ns, as much as
# its arithmetic on a few rows. Without, nothing may be allocated here, nor in what this is the first to call.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}

borrower = njit(**_OPTIONS)
