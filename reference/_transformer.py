"""The Transformer layer that SASRec and BERT4Rec share: post-norm, GELU, multi-head attention.

    x = LayerNorm(x + Dropout(o(softmax(q k^T / sqrt(d_head) + mask) v)))
    x = LayerNorm(x + Dropout(fc2(gelu(fc1 x))))

`last` computes one query per row, against the keys and values of all positions: what the final layer of a next-item
model needs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12
INIT_STD = 0.02


class TransformerLayer(nn.Module):
    """One layer over x [B, L, D]."""

    def __init__(self, d_model: int, n_heads: int, dropout: float, inner: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout_p = dropout
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.attention_norm = nn.LayerNorm(d_model, eps=EPS)
        self.fc1 = nn.Linear(d_model, inner)
        self.fc2 = nn.Linear(inner, d_model)
        self.ffn_norm = nn.LayerNorm(d_model, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, last: Tensor | None = None
    ) -> Tensor:
        """x [B, L, D] to [B, L, D], or, with positions `last` [B], to [B, 1, D] at those positions.

        Args:
            mask: bool, broadcast to [B, heads, queries, L], True where a query may look.
            causal: let position t look at positions up to t; instead of `mask`.
        """
        keys, values = (self._heads(part) for part in self.key_value(x).chunk(2, dim=-1))
        if last is not None:
            x = x.gather(1, last[:, None, None].expand(-1, 1, x.shape[2]))
        attended = F.scaled_dot_product_attention(
            self._heads(self.query(x)),
            keys,
            values,
            attn_mask=mask,
            dropout_p=self.dropout_p if self.training else 0.0,
            is_causal=causal,
        )
        attended = attended.transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.dropout(self.out(attended)))
        return self.ffn_norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, D] to [B, heads, L, D / heads]."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


def initialise(module: nn.Module) -> None:
    """N(0, 0.02) for every Linear and Embedding, zero biases."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            nn.init.normal_(child.weight, std=INIT_STD)
        if isinstance(child, nn.Linear):
            nn.init.zeros_(child.bias)
