"""How the engine's functions are compiled, and when a compiled one may be taken from the disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numba import njit

# numba counts references to every array in every call, atomically: a call with twenty arrays costs 150 ns, as much as
# its arithmetic on a few rows. Nothing here is counted, so nothing may be allocated: what a kernel needs it is given.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}

part = njit(**_OPTIONS)
inline = njit(forceinline=True, **_OPTIONS)


def entry(function):
    """Compile what is called from Python, and keep the result on disk where there is a place for it."""
    try:
        compiled = njit(function, cache=True, **_OPTIONS)
    except RuntimeError:  # a read-only installation without a home
        return njit(function, **_OPTIONS)
    # numba looks at the file of the function alone, which calls functions of other files.
    file = compiled._cache._cache_file
    file._source_stamp = (file._source_stamp, _SOURCES)
    read = file._load_index

    def load_index():
        try:
            return read()
        except Exception:  # of another version, with types that are no more; it is written anew
            return {}

    file._load_index = load_index
    return compiled


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = _digest()
