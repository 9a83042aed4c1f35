"""fastm2rec: the M2Rec sequential recommender as a performance package.

The public names below are imported when they are first used, so `import fastm2rec` costs next to nothing and needs no
package but torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .base import Recommendation, SequentialRecommender, build_model
    from .baselines import BERT4Rec, GRU4Rec, SASRec
    from .config import BERT4RecConfig, GRU4RecConfig, M2RecConfig, SASRecConfig
    from .folded import FoldedM2Rec
    from .impl import ImplementationError
    from .model import M2Rec, M2RecEncoder
    from .recommender import Recommendations, Recommender
    from .storage import StorageError
    from .vocab import UnknownItemError, Vocabulary

_HOME = {
    "BERT4Rec": "baselines",
    "BERT4RecConfig": "config",
    "FoldedM2Rec": "folded",
    "GRU4Rec": "baselines",
    "GRU4RecConfig": "config",
    "ImplementationError": "impl",
    "M2Rec": "model",
    "M2RecConfig": "config",
    "M2RecEncoder": "model",
    "Recommendation": "base",
    "Recommendations": "recommender",
    "Recommender": "recommender",
    "SASRec": "baselines",
    "SASRecConfig": "config",
    "SequentialRecommender": "base",
    "StorageError": "storage",
    "UnknownItemError": "vocab",
    "Vocabulary": "vocab",
    "build_model": "base",
}

__all__ = [
    "BERT4Rec",
    "BERT4RecConfig",
    "FoldedM2Rec",
    "GRU4Rec",
    "GRU4RecConfig",
    "ImplementationError",
    "M2Rec",
    "M2RecConfig",
    "M2RecEncoder",
    "Recommendation",
    "Recommendations",
    "Recommender",
    "SASRec",
    "SASRecConfig",
    "SequentialRecommender",
    "StorageError",
    "UnknownItemError",
    "Vocabulary",
    "__version__",
    "build_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
