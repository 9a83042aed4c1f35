"""GRU4Rec (arXiv 1511.06939) in the form that RecBole and the tables beside M2Rec use: one GRU, softmax over all items.

    x_t = Dropout(item_embedding[id_t])
    h_t = GRU(x_t, h_{t-1})                     hidden width H
    scores = (W h_last + b) item_embedding^T    W [D, H]

B batch   L <= max_len slots   D = d_model   H hidden   item_ids [B, L], items 1..n_items, right-padded with 0
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INIT_STD = 0.02


class GRU4Rec(nn.Module):
    """The network. The GRU keeps torch's own start values, as Linear and Embedding do not."""

    def __init__(
        self, n_items: int, d_model: int = 64, hidden: int = 128, n_layers: int = 1, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(n_items + 1, d_model)
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(d_model, hidden, n_layers, batch_first=True)
        self.linear = nn.Linear(hidden, d_model)
        for child in (self.item_embedding, self.linear):
            nn.init.normal_(child.weight, std=INIT_STD)
        nn.init.zeros_(self.linear.bias)

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """The query vectors [B, D] at positions lengths - 1."""
        rows = torch.arange(len(item_ids), device=item_ids.device)
        return self.linear(self._states(item_ids)[rows, lengths - 1])

    def hidden(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """Every position, [B, L, D]; a real one has seen real ones only, since padding comes after them."""
        return self.linear(self._states(item_ids))

    def _states(self, item_ids: Tensor) -> Tensor:
        states, _ = self.gru(self.dropout(self.item_embedding(item_ids)))
        return states
