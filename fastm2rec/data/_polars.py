"""polars, imported when it is first used: a data set that `fastm2rec prepare` wrote is read and trained on without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl
else:

    class _OnFirstUse:
        def __getattr__(self, name: str) -> Any:
            try:
                import polars
            except ModuleNotFoundError as error:
                raise ImportError(
                    'reading a log needs polars, which is not installed: pip install "fastm2rec[train]"',
                    name=error.name,
                ) from error
            return getattr(polars, name)

    pl = _OnFirstUse()

__all__ = ["pl"]
