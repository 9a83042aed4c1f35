"""Mamba4Rec (arXiv 2403.03900): M2Rec without the filter and without the gate.

    x = LayerNorm(Dropout(item_embedding[ids]))
    per layer: x = LayerNorm(Dropout(Mamba(x)) [+ x where n_layers > 1]);  x = LayerNorm(x + FFN(x))
    scores = x_last item_embedding^T

Causal: position t sees items up to t, so a loss at every position is sound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .m2rec import EPS, FeedForward
from .mamba import Mamba


class Mamba4RecLayer(nn.Module):
    """Mamba and feed-forward network."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.residual = config.n_layers > 1
        self.mamba = Mamba(config.d_model, config.d_state, config.d_conv, config.expand, config.resolved_dt_rank)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.d_model, eps=EPS)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.mamba(x))
        return self.ffn(self.norm(y + x if self.residual else y))


class Mamba4Rec(nn.Module):
    """The model; `config` is any object with the fields of `fastm2rec.M2RecConfig`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(config.n_items + 1, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.input_norm = nn.LayerNorm(config.d_model, eps=EPS)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Mamba4RecLayer(config) for _ in range(config.n_layers))

    def hidden(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """[B, L, D] at every position; what stands at padding does not matter, nothing looks back at it."""
        x = self.input_norm(self.dropout(self.item_embedding(item_ids)))
        layers = self.encoder.layers
        assert isinstance(layers, nn.ModuleList)
        for layer in layers:
            x = layer(x)
        return x

    def forward(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """ids [B, L], right-padded with 0, and lengths [B] to the query vectors [B, D]."""
        return self.hidden(item_ids, lengths)[torch.arange(len(item_ids), device=item_ids.device), lengths - 1]
