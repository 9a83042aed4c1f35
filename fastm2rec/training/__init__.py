"""Training and evaluation: from a log and a few options to a run's folder, and to full-ranking metrics."""

from .config import DataConfig, RunConfig, TrainConfig
from .evaluate import evaluate, evaluate_popularity
from .inputs import Inputs, load_inputs
from .loop import DivergedError, TrainResult, train
from .run import RunError, RunFolder

__all__ = [
    "DataConfig",
    "DivergedError",
    "Inputs",
    "RunConfig",
    "RunError",
    "RunFolder",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "evaluate_popularity",
    "load_inputs",
    "train",
]
