"""A sentence encoder tuned on the interactions: items that follow each other should have texts that lie close.

The pairs come from the training part of each sequence alone, the part that `fastm2rec train` reads with the same
k-core, so the events held out for validation and test leave no trace in the encoder. The training is
sentence-transformers' own: its trainer, and its MultipleNegativesRankingLoss, in which the other items of a batch are
the negatives.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._version import __version__
from ..data import DataError, SequenceDataset
from ..data.samples import training_part
from ..storage import PathLike, write_json
from .encoder import DEFAULT_MODEL, Encoder, import_sentence_transformers, load_encoder

if TYPE_CHECKING:
    from datasets import Dataset

RECORD_FILE = "tuning.json"


@dataclass(frozen=True)
class TuneResult:
    """What was trained: pairs an epoch, steps of the optimiser, and the mean loss in the first and the last tenth."""

    pairs: int
    steps: int
    first_loss: float
    last_loss: float


def training_pairs(dataset: SequenceDataset, window: int = 1) -> Tensor:
    """Items that follow each other in the training part of a user's sequence.

    Args:
        dataset: the sequences.
        window: how many places later the second item may stand, at least 1.

    Returns:
        [n, 2] int64 dense ids, the earlier item first; a pair that occurs several times is there several times. An item
        and itself are no pair.

    Raises:
        ValueError: a window below 1.
    """
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    lengths = dataset.offsets.diff()
    ends = torch.repeat_interleave(training_part(dataset), lengths)
    place = torch.arange(len(dataset.items))
    pairs = []
    for gap in range(1, window + 1):
        earlier = place[place + gap < ends]
        pairs.append(torch.stack([dataset.items[earlier], dataset.items[earlier + gap]], dim=1))
    together = torch.cat(pairs)
    return together[together[:, 0] != together[:, 1]]


def tune_encoder(
    dataset: SequenceDataset,
    texts: Sequence[str],
    out: PathLike,
    model: PathLike | Encoder = DEFAULT_MODEL,
    *,
    window: int = 1,
    epochs: int = 1,
    batch_size: int = 64,
    lr: float = 2e-5,
    max_pairs: int | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> TuneResult:
    """Fine-tune a sentence encoder and write it to a folder that `embed_items` takes.

    Args:
        dataset: the sequences.
        texts: of the items in the order of its vocabulary; "" for an item without text, which is in no pair.
        out: a new folder; it appears when the training is done.
        model: where to start, see `load_encoder`.
        window: see `training_pairs`.
        epochs: passes over the pairs.
        batch_size: pairs of a step; the other pairs of a batch are the negatives, so at least 2.
        lr: peak learning rate; it warms up over a tenth of the steps and falls to zero.
        max_pairs: a random choice of so many pairs; None takes all.
        seed: of that choice and of the training.
        device: "cpu" or "cuda"; by default CUDA if there is a device.
        progress: show a bar.

    Raises:
        ImportError: sentence-transformers or what it trains with is not installed.
        ValueError: numbers out of range, a folder that is not empty, or a model that cannot be loaded.
        DataError: a number of texts that is not the number of items, or no pair of different texts.
    """
    out = Path(out)
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 2), ("max_pairs", max_pairs, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not lr > 0:
        raise ValueError(f"lr: expected a number above 0, got {lr}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; name a new folder")
    if len(texts) != dataset.n_items:
        raise DataError(f"texts: expected one per item ({dataset.n_items}), got {len(texts)}")
    anchors, positives = _text_pairs(training_pairs(dataset, window), texts, max_pairs, seed)
    _require_trainer()
    encoder = model if isinstance(model, Encoder) else load_encoder(model, device=device)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        result = _train(encoder, _as_dataset(anchors, positives), partial, epochs, batch_size, lr, seed, progress)
        settings = {"window": window, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
        record = {"base": encoder.name, "base_version": encoder.version, "data": dataset.fingerprint(), **settings}
        write_json(partial / RECORD_FILE, {**record, **asdict(result), "fastm2rec": __version__})
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _text_pairs(pairs: Tensor, texts: Sequence[str], max_pairs: int | None, seed: int) -> tuple[list[str], list[str]]:
    """The pairs as texts, without those that have no text or the same one."""
    number = {text: place for place, text in enumerate(dict.fromkeys(["", *texts]))}
    text_of = torch.tensor([0, *(number[text] for text in texts)])[pairs]
    useful = pairs[(text_of != 0).all(dim=1) & (text_of[:, 0] != text_of[:, 1])]
    if not len(useful):
        raise DataError(f"dataset: none of {len(pairs):,} pairs of training items has two different texts")
    if max_pairs is not None and len(useful) > max_pairs:
        chosen = torch.randperm(len(useful), generator=torch.Generator().manual_seed(seed))[:max_pairs]
        useful = useful[chosen]
    earlier, later = useful.T.tolist()
    return [texts[item - 1] for item in earlier], [texts[item - 1] for item in later]


def _require_trainer() -> None:
    import_sentence_transformers()
    try:
        import accelerate  # noqa: F401
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'tuning needs {error.name}, which is not installed: pip install "fastm2rec[text]"', name=error.name
        ) from None


def _as_dataset(anchors: list[str], positives: list[str]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({"anchor": anchors, "positive": positives})


def _train(
    encoder: Encoder, pairs: Dataset, out: Path, epochs: int, batch_size: int, lr: float, seed: int, progress: bool
) -> TuneResult:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.base.sampler import BatchSamplers
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    steps = -(-len(pairs) // batch_size) * epochs
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        warmup_steps=0.1,
        # A text that occurs twice in a batch would be its own negative.
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        prompts=encoder.prompt or None,
        use_cpu=encoder.model.device.type == "cpu",
        seed=seed,
        save_strategy="no",
        logging_steps=max(1, steps // 10),
        report_to="none",
        disable_tqdm=not progress,
    )
    trainer = SentenceTransformerTrainer(
        encoder.model, arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(encoder.model)
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    encoder.model.save_pretrained(str(out))
    return TuneResult(len(pairs), trainer.state.global_step, losses[0], losses[-1])
