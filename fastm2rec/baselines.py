"""The baselines as recommenders: the reference networks with scoring, saving and recommending added."""

from __future__ import annotations

from torch import Tensor

from .base import SequentialRecommender
from .config import BERT4RecConfig, GRU4RecConfig, SASRecConfig
from .reference.bert4rec import BERT4Rec as _BERT4Rec
from .reference.gru4rec import GRU4Rec as _GRU4Rec
from .reference.sasrec import SASRec as _SASRec


def _check_catalogue(config: SASRecConfig | GRU4RecConfig) -> None:
    if config.n_items < 1:
        raise ValueError(f"n_items: expected at least 1, got {config.n_items}")


class SASRec(_SASRec, SequentialRecommender):
    """SASRec (arXiv 1808.09781): a causal Transformer, two layers and two heads by default.

    Args:
        config: what to build; `n_items` must be at least 1.
    """

    def __init__(self, config: SASRecConfig) -> None:
        _check_catalogue(config)
        super().__init__(
            config.n_items, config.max_len, config.d_model, config.n_layers, config.n_heads, config.dropout
        )
        self.config = config

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def item_weight(self) -> Tensor:
        return self.item_embedding.weight

    def encode(self, item_ids: Tensor, lengths: Tensor, *, pruned: bool = True) -> Tensor:
        return super().encode(*self.check_batch(item_ids, lengths), pruned=pruned)

    def hidden(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        return super().hidden(*self.check_batch(item_ids, lengths))


class BERT4Rec(_BERT4Rec, SequentialRecommender):
    """BERT4Rec (arXiv 1904.06690): a bidirectional Transformer that reads a mask token after the last item.

    Args:
        config: what to build; `n_items` must be at least 1.
    """

    config: BERT4RecConfig

    def __init__(self, config: BERT4RecConfig) -> None:
        _check_catalogue(config)
        super().__init__(
            config.n_items, config.max_len, config.d_model, config.n_layers, config.n_heads, config.dropout
        )
        self.config = config

    @property
    def is_causal(self) -> bool:
        return False

    @property
    def item_weight(self) -> Tensor:
        return self.item_embedding.weight[: self.n_items + 1]

    def encode(self, item_ids: Tensor, lengths: Tensor, *, pruned: bool = True) -> Tensor:
        return super().encode(*self.check_batch(item_ids, lengths), pruned=pruned)


class GRU4Rec(_GRU4Rec, SequentialRecommender):
    """GRU4Rec (arXiv 1511.06939): one GRU layer of width 128 by default.

    Args:
        config: what to build; `n_items` must be at least 1.
    """

    config: GRU4RecConfig

    def __init__(self, config: GRU4RecConfig) -> None:
        _check_catalogue(config)
        super().__init__(config.n_items, config.d_model, config.gru_width, config.n_layers, config.dropout)
        self.config = config

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def item_weight(self) -> Tensor:
        return self.item_embedding.weight

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        return super().encode(*self.check_batch(item_ids, lengths))

    def hidden(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        return super().hidden(*self.check_batch(item_ids, lengths))
