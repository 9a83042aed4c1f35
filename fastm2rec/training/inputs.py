"""What a run reads: the data set, and the text table where the model's gate wants one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base import SequentialRecommender, build_model
from ..config import M2RecConfig
from ..data import DataError, SequenceDataset, load_dataset
from .config import DataConfig, RunConfig
from .runtime import derive


@dataclass(frozen=True)
class Inputs:
    """Data in memory.

    Args:
        dataset: the sequences.
        text: embeddings of the items' text [n_items + 1, T], row 0 zero; None without text.
        files: what was read, for the record.
        text_source: where the text came from.
        text_missing: items without text; their rows are zero.
    """

    dataset: SequenceDataset
    text: Tensor | None = None
    files: tuple[str, ...] = ()
    text_source: str | None = None
    text_missing: int = 0

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts, with digests that tell other data from the same data in another place."""
        text = None
        if self.text is not None:
            digest = hashlib.sha256(self.text.contiguous().numpy().tobytes()).hexdigest()
            text = {"source": self.text_source, "missing": self.text_missing, "digest": digest}
        return {
            "fingerprint": self.dataset.fingerprint(),
            "files": list(self.files),
            **self.dataset.statistics(),
            "text": text,
        }


def load_inputs(config: DataConfig, *, with_text: bool) -> Inputs:
    """Read the data set that `config` names.

    Args:
        config: what to read.
        with_text: read the text table, too.

    Raises:
        DataError: as the readers raise, or a text table was asked for by name and no gate reads it.
    """
    if not with_text and config.text not in ("auto", "none"):
        raise DataError(f"text: expected auto or none with a gate that reads no text, got {config.text}")
    loaded = load_dataset(
        config.dataset,
        config.data,
        user_min=config.user_min,
        item_min=config.item_min,
        text=config.text if with_text else "none",
    )
    if loaded.text is None:
        return Inputs(loaded.dataset, files=loaded.files)
    return Inputs(loaded.dataset, loaded.text.table, loaded.files, loaded.text_source, loaded.text.missing)


def reads_text(config: RunConfig) -> bool:
    """Does the run's model take text embeddings?"""
    return isinstance(config.model, M2RecConfig) and config.model.uses_text


def make_model(config: RunConfig, inputs: Inputs) -> SequentialRecommender:
    """The untrained model of a run, the same every time.

    Raises:
        ValueError: the gate reads text and there is none, or the table does not fit.
    """
    assert config.model is not None
    sizes: dict[str, int] = {"n_items": inputs.dataset.n_items}
    text = None
    if reads_text(config):
        text = inputs.text
        if text is None:
            gate = config.to_dict()["gate"]
            place = f"no file text* was found in {config.data.data}" if config.data.text == "auto" else "--text is none"
            raise ValueError(
                f"gate={gate!r} reads text embeddings of the items, and {place}; name a table with --text FILE, or "
                "train without text: --gate none"
            )
        sizes["text_dim"] = text.shape[1]
    values = {**config.model.to_dict(), **sizes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.train.seed, "model"))
        model = build_model(config.model.model_type, values, text)
    model.vocab = inputs.dataset.vocab
    return model
