"""SASRec (arXiv 1808.09781) in the form that current benchmarks use: post-norm, GELU, softmax over all items.

x_t = Dropout(LayerNorm(item_embedding[id_t] + position_embedding[t]))
two causal Transformer layers
scores = x_last item_embedding^T

B batch   L <= max_len slots   D = d_model   item_ids [B, L], items 1..n_items, right-padded with 0
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._transformer import EPS, TransformerLayer, initialise


class SASRec(nn.Module):
    """The network. Positions count from the row's first item, as in RecBole."""

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
        self.item_embedding = nn.Embedding(n_items + 1, d_model)
        self.position_embedding = nn.Embedding(max_len, d_model)
        self.input_norm = nn.LayerNorm(d_model, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        width = 4 * d_model if inner is None else inner
        self.layers = nn.ModuleList(TransformerLayer(d_model, n_heads, dropout, width) for _ in range(n_layers))
        initialise(self)

    def encode(self, item_ids: Tensor, lengths: Tensor, *, pruned: bool = True) -> Tensor:
        """The query vectors [B, D] at positions lengths - 1.

        Args:
            pruned: let the final layer compute those positions only. The result is that of computing all of them.
        """
        if not pruned:
            return self.hidden(item_ids, lengths)[torch.arange(len(item_ids), device=item_ids.device), lengths - 1]
        x = self._run(item_ids, self.layers[:-1])
        # Every position up to the last real one may be looked at: a key mask is what causality becomes here.
        real = torch.arange(item_ids.shape[1], device=item_ids.device) < lengths[:, None]
        return self.layers[-1](x, mask=real[:, None, None, :], last=lengths - 1).squeeze(1)

    def hidden(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """Every position, [B, L, D]; a real one looks at real ones only, since padding comes after them."""
        return self._run(item_ids, self.layers)

    def _run(self, item_ids: Tensor, layers: nn.ModuleList) -> Tensor:
        positions = self.position_embedding.weight[: item_ids.shape[1]]
        x = self.dropout(self.input_norm(self.item_embedding(item_ids) + positions))
        for layer in layers:
            x = layer(x, causal=True)
        return x
