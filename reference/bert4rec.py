"""BERT4Rec (arXiv 1904.06690): a bidirectional Transformer that fills in masked items.

    x_t = Dropout(LayerNorm(item_embedding[id_t] + position_embedding[t]))
    two Transformer layers in which every real position looks at every real position
    scores = LayerNorm(gelu(head x)) item_embedding^T

Training replaces items by the mask token (id n_items + 1) and asks for them back; prediction appends one mask token
after the last item.

    B batch   L <= max_len slots   D = d_model   item_ids [B, L], items 1..n_items, right-padded with 0
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._transformer import EPS, TransformerLayer, initialise


class BERT4Rec(nn.Module):
    """The network. It reads max_len items and one mask token, so it has max_len + 1 positions."""

    def __init__(
        self,
        n_items: int,
        max_len: int,
        d_model: int = 64,
        n_layers: int = 2,
        n_heads: int = 2,
        dropout: float = 0.2,
        inner: int | None = None,
    ) -> None:
        super().__init__()
        self.mask_token = n_items + 1
        self.item_embedding = nn.Embedding(n_items + 2, d_model)
        self.position_embedding = nn.Embedding(max_len + 1, d_model)
        self.input_norm = nn.LayerNorm(d_model, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        width = 4 * d_model if inner is None else inner
        self.layers = nn.ModuleList(TransformerLayer(d_model, n_heads, dropout, width) for _ in range(n_layers))
        self.head = nn.Linear(d_model, d_model)
        self.head_norm = nn.LayerNorm(d_model, eps=EPS)
        initialise(self)

    def encode(self, item_ids: Tensor, lengths: Tensor, *, pruned: bool = True) -> Tensor:
        """The query vectors [B, D]: the output at a mask token appended after the last item.

        Args:
            pruned: let the final layer compute that position only. The result is that of computing all of them.
        """
        masked = F.pad(item_ids, (0, 1)).scatter(1, lengths[:, None], self.mask_token)
        if not pruned:
            rows = torch.arange(len(item_ids), device=item_ids.device)
            return self.hidden(masked, lengths + 1)[rows, lengths]
        x, mask = self._run(masked, lengths + 1, self.layers[:-1])
        return self._head(self.layers[-1](x, mask=mask, last=lengths).squeeze(1))

    def hidden(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """Every position, [B, L, D], for item_ids [B, L <= max_len + 1] that may hold mask tokens. Not causal."""
        x, _ = self._run(item_ids, lengths, self.layers)
        return self._head(x)

    def _run(self, item_ids: Tensor, lengths: Tensor, layers: nn.ModuleList) -> tuple[Tensor, Tensor]:
        real = torch.arange(item_ids.shape[1], device=item_ids.device) < lengths[:, None]
        mask = real[:, None, None, :]
        positions = self.position_embedding.weight[: item_ids.shape[1]]
        x = self.dropout(self.input_norm(self.item_embedding(item_ids) + positions))
        for layer in layers:
            x = layer(x, mask=mask)
        return x, mask

    def _head(self, x: Tensor) -> Tensor:
        return self.head_norm(F.gelu(self.head(x)))
