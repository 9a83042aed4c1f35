"""Embeddings that were already computed: one SQLite file, by a hash of who embedded what.

Each batch is a transaction, so a run that is killed has lost at most one, and several runs may share a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..storage import PathLike, StorageError

FILE = "embeddings.sqlite"
WAIT_SECONDS = 60.0  # for another run to finish writing its batch


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/fastm2rec`, or `~/.cache/fastm2rec`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastm2rec"


class EmbeddingCache:
    """Rows of float32 by model and text.

    Args:
        folder: made if need be; it holds the file `embeddings.sqlite`.
        model: identifies what computes the rows: weights, configuration and prompt.

    Raises:
        StorageError: the file cannot be opened or written, or is no cache. All methods raise it likewise.
    """

    def __init__(self, folder: PathLike, model: str) -> None:
        self.path = Path(folder) / FILE
        self._model = model
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=WAIT_SECONDS)
            with self._file:
                self._file.execute("CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, row BLOB NOT NULL)")

    def read(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The rows [T] float32 of those of `texts` that are known."""
        found = {}
        with self._errors():
            for text in texts:
                row = self._file.execute("SELECT row FROM embeddings WHERE key = ?", (self._key(text),)).fetchone()
                if row is not None:
                    found[text] = np.frombuffer(row[0], dtype="<f4")
        return found

    def write(self, rows: Mapping[str, np.ndarray]) -> None:
        """Keep rows; all of them are on the disk when this returns."""
        records = [(self._key(text), row.astype("<f4").tobytes()) for text, row in rows.items()]
        with self._errors(), self._file:
            self._file.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", records)

    def close(self) -> None:
        self._file.close()

    def _key(self, text: str) -> bytes:
        # The template is not part of it: it shows in the text, and the same text has the same embedding.
        return hashlib.sha256(json.dumps([self._model, text]).encode()).digest()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise StorageError(f"{self.path}: not usable as a cache of embeddings: {error}") from error
