"""What a model is asked in training: which samples, which positions, which loss.

Three ways to ask. `Prefixes`: every prefix of a user is a sample and the item after it the target. `AllPositions`: a
whole sequence, with every next item a target, for models whose positions do not see what comes later. `Cloze`: a whole
sequence in which items are masked and asked for, BERT4Rec's way.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..base import SequentialRecommender
from ..baselines import BERT4Rec
from ..data import PrefixSamples, SequenceDataset, SequenceSamples
from ..losses import next_item_loss
from .config import RunConfig

# Share of the sequences in which Cloze masks the last item alone, as at prediction (arXiv 1904.06690 section 3.6 adds
# such samples and does not say how many).
LAST_ONLY = 0.5


class Question(Protocol):
    """A way to ask a model for items."""

    @property
    def samples_per_epoch(self) -> int:
        """How many indices `epoch_indices` returns."""

    def epoch_indices(self, epoch: int, seed: int) -> Tensor:
        """The samples of an epoch, in order: a function of (seed, epoch) alone."""

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input ids [B, L] right-padded with 0, lengths [B], and targets: [B], or [B, L] with 0 where none is asked."""

    def queries(self, model: SequentialRecommender, item_ids: Tensor, lengths: Tensor, asked: Tensor) -> Tensor:
        """The model's query vectors at what is asked for, [n, D]; `asked` [n] are the places of targets that are not 0,
        counted through all rows."""


class Prefixes:
    """The target after each prefix, from the last position."""

    def __init__(self, dataset: SequenceDataset, max_len: int, prefixes_per_user: int | None) -> None:
        self._samples = PrefixSamples(dataset, max_len, "train", prefixes_per_user)
        self.samples_per_epoch = self._samples.samples_per_epoch
        self.epoch_indices = self._samples.epoch_indices

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch = self._samples.batch(indices)
        return batch.item_ids, batch.lengths, batch.targets

    def queries(self, model: SequentialRecommender, item_ids: Tensor, lengths: Tensor, asked: Tensor) -> Tensor:
        return model.encode(item_ids, lengths)


class AllPositions:
    """The next item at every position of a user's last max_len + 1 training items."""

    def __init__(self, dataset: SequenceDataset, max_len: int) -> None:
        self._samples = SequenceSamples(dataset, max_len + 1)
        self.samples_per_epoch = len(self._samples)
        self.epoch_indices = self._samples.epoch_indices

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        item_ids, lengths, _ = self._samples.batch(indices)
        inputs = item_ids[:, :-1]
        padding = torch.arange(inputs.shape[1]) >= lengths[:, None] - 1
        return inputs.masked_fill(padding, 0), lengths - 1, item_ids[:, 1:]

    def queries(self, model: SequentialRecommender, item_ids: Tensor, lengths: Tensor, asked: Tensor) -> Tensor:
        return model.hidden(item_ids, lengths).flatten(0, 1)[asked]


class Cloze:
    """Masked items of a user's last max_len + 1 training items, so that every position the prediction uses is trained.

    An epoch is 1 / mask_prob passes over the users: every event is masked about once.
    """

    def __init__(self, dataset: SequenceDataset, max_len: int, mask_prob: float, mask_token: int) -> None:
        self._samples = SequenceSamples(dataset, max_len + 1)
        self._mask_prob = mask_prob
        self._mask_token = mask_token
        self._passes = max(1, round(1 / mask_prob))
        self.samples_per_epoch = self._passes * len(self._samples)

    def epoch_indices(self, epoch: int, seed: int) -> Tensor:
        first = epoch * self._passes
        return torch.cat([self._samples.epoch_indices(first + number, seed) for number in range(self._passes)])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        item_ids, lengths, _ = self._samples.batch(indices)
        slots = torch.arange(item_ids.shape[1])
        last = slots == lengths[:, None] - 1
        masked = (torch.rand(item_ids.shape) < self._mask_prob) & (slots < lengths[:, None])
        # The last one also where chance masked none: a sequence without a question teaches nothing.
        last_only = (torch.rand(len(indices)) < LAST_ONLY) | ~masked.any(dim=1)
        masked = torch.where(last_only[:, None], last, masked)
        return item_ids.masked_fill(masked, self._mask_token), lengths, item_ids.masked_fill(~masked, 0)

    def queries(self, model: SequentialRecommender, item_ids: Tensor, lengths: Tensor, asked: Tensor) -> Tensor:
        return model.hidden(item_ids, lengths).flatten(0, 1)[asked]


def make_question(config: RunConfig, model: SequentialRecommender, dataset: SequenceDataset) -> Question:
    """The way to ask that `config` names, if it is sound for `model`.

    Raises:
        ValueError: a loss at every position of a model whose positions see later items.
    """
    train = config.train
    if train.positions == "all" and not model.is_causal:
        why = (
            "it reads the sequence in both directions and is trained by masking"
            if isinstance(model, BERT4Rec)
            else "its low-pass filter mixes every item of the sequence into every position, so an inner position has "
            "already seen the item it is asked for: the loss would be low and the model worthless"
        )
        raise ValueError(f"positions: expected 'last' with model={config.model_name}, got 'all'; {why}")
    if config.whole_sequences and train.prefixes_per_user is not None:
        raise ValueError(
            f"prefixes_per_user: expected None with model={config.model_name} and positions={train.positions!r}, where "
            f"samples are whole sequences, got {train.prefixes_per_user}"
        )
    if isinstance(model, BERT4Rec):
        return Cloze(dataset, model.max_len, model.config.mask_prob, model.mask_token)
    if train.positions == "all":
        return AllPositions(dataset, model.max_len)
    return Prefixes(dataset, model.max_len, train.prefixes_per_user)


class Objective(nn.Module):
    """The sum of the losses of some samples, as one module: the unit that is wrapped for several processes.

    Args:
        model: what is trained.
        question: how it is asked.
        config: loss and precision.
    """

    def __init__(self, model: SequentialRecommender, question: Question, config: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.question = question
        self._train = config.train

    @staticmethod
    def inputs(item_ids: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `forward` takes, of a question's batch. To be made on the host, which would wait for a GPU to count."""
        asked = targets.flatten().nonzero().squeeze(1)
        return item_ids, lengths, asked, targets.flatten()[asked]

    def forward(self, item_ids: Tensor, lengths: Tensor, asked: Tensor, wanted: Tensor) -> Tensor:
        """A 0-dim float32 tensor, summed over the targets: `asked` as of `Question.queries`, `wanted` [n] the items."""
        with torch.autocast(item_ids.device.type, torch.bfloat16, enabled=self._train.amp == "bf16"):
            queries = self.question.queries(self.model, item_ids, lengths, asked)
            return next_item_loss(
                queries, self.model.item_weight, wanted, self._train.loss, self._train.n_negatives, reduction="sum"
            )
