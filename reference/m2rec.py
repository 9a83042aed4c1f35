"""M2Rec (arXiv 2505.04445), every position computed and the last real one taken: the specification of the package.

    x = LayerNorm(Dropout(item_embedding[ids])), padding rows 0
    per layer: y = Mamba with the low-pass filter inside (between its convolution and SiLU) or on its input
               x = LayerNorm(Dropout(y) [+ x where n_layers > 1]);  x = LayerNorm(x + FFN(x))
    E_m = x at the last real position;  E_l = text_proj(text[last item]);  Y = gated_fusion(E_m, E_l)
    scores = Y item_embedding^T

    B batch   L slots   D = d_model   T width of the text embeddings   ids [B, L], items 1..n_items, 0 padding

`config` is any object with the fields of `fastm2rec.M2RecConfig`. Parameter names are those of `fastm2rec.M2Rec`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gated_fusion import gated_fusion, scale_text
from .mamba import Mamba, every
from .spectral_projection import spectral_filter

EPS = 1e-12


class Filter(nn.Module):
    """theta, fixed or learned, and the filter that it cuts off."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        if config.mask != "hard":
            self.theta_logit = nn.Parameter(torch.tensor(math.log(2 * config.theta / (1 - 2 * config.theta))))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        c = self.config
        if c.mask == "hard" and c.theta >= 0.5:
            return x
        theta = c.theta if c.mask == "hard" else 0.5 * torch.sigmoid(self.theta_logit)
        return spectral_filter(x, theta, mask=c.mask, tau=c.tau, basis=c.basis, spectrum=c.spectrum, lengths=lengths)


class FeedForward(nn.Module):
    """LayerNorm(x + Dropout(fc2(Dropout(gelu(fc1 x)))))."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.ffn_mult * config.d_model)
        self.fc2 = nn.Linear(config.ffn_mult * config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x))))))


class Layer(nn.Module):
    """Filter, Mamba, feed-forward network."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        if config.filter_placement != "none":
            self.filter = Filter(config)
        self.mamba = Mamba(
            config.d_model,
            config.d_state,
            config.d_conv,
            config.expand,
            config.resolved_dt_rank,
            scan_norm=config.scan_norm,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.d_model, eps=EPS)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, lengths: Tensor, stride: int = 1) -> Tensor:
        placement = self.config.filter_placement
        mixed = self.filter(x, lengths) if placement == "input" else x
        inner = partial(self.filter, lengths=lengths) if placement == "inner" else None
        y = self.dropout(self.mamba(mixed, lengths, inner, stride))
        if self.config.n_layers > 1:
            y = y + (every(x, lengths, stride) if stride > 1 else x)
        return self.ffn(self.norm(y))


class Encoder(nn.Module):
    """The stack of layers; only the last one is strided."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, L, D] to the last layer's output [B, ceil(L / stride), D] and its rows' lengths."""
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        for depth, layer in enumerate(self.layers, start=1):
            x = x.masked_fill(padding[..., None], 0.0)
            x = layer(x, lengths, self.config.stride if depth == len(self.layers) else 1)
        stride = self.config.stride
        return x, (lengths + stride - 1) // stride


class Fusion(nn.Module):
    """The gate's parameters."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        if config.uses_text:
            self.text_proj = nn.Linear(config.text_dim, d)
        if config.gate == "context":
            self.gate_proj = nn.Linear(2 * d, 2 * d)
        elif config.uses_text:
            shape = () if config.gate == "scalar" else (d,)
            self.alpha = nn.Parameter(torch.full(shape, 0.5))
            self.beta = nn.Parameter(torch.full(shape, 0.5))
        self.linear = nn.Linear(d, d)

    def forward(self, h: Tensor, text: Tensor | None) -> Tensor:
        gate, linear, residual = self.config.gate, self.linear, self.config.gate_residual
        if text is None:
            return gated_fusion(h, None, None, None, linear.weight, linear.bias, residual=residual)
        text = self.text_proj(text)
        if gate == "context":
            return gated_fusion(
                h, text, None, None, linear.weight, linear.bias,
                gate_weight=self.gate_proj.weight, gate_bias=self.gate_proj.bias, residual=residual,
            )  # fmt: skip
        return gated_fusion(h, text, self.alpha, self.beta, linear.weight, linear.bias, residual=residual)


class M2Rec(nn.Module):
    """The model. `text` [n_items + 1, T] is needed exactly when the gate reads text; it is kept scaled."""

    def __init__(self, config: Any, text: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.item_embedding = nn.Embedding(config.n_items + 1, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.input_norm = nn.LayerNorm(config.d_model, eps=EPS)
        self.encoder = Encoder(config)
        self.text: Tensor | None
        self.register_buffer("text", None if text is None else scale_text(text, config.text_scale))
        if config.gate != "none":
            self.fusion = Fusion(config)

    def hidden(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """The query at every position, [B, L, D]. Not causal: do not train on it (the filter sees later items)."""
        item_ids = self._padded(item_ids)
        h, _ = self.encoder(self._embed(item_ids), lengths)
        if self.config.gate == "none":
            return h
        return self.fusion(h, None if self.text is None else self.text[item_ids])

    def forward(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """ids [B, L], right-padded with 0, and lengths [B] to the query vectors [B, D]."""
        rows = torch.arange(len(item_ids), device=item_ids.device)
        item_ids = self._padded(item_ids)
        states, kept = self.encoder(self._embed(item_ids), lengths)
        h = states[rows, kept - 1]
        if self.config.gate == "none":
            return h
        return self.fusion(h, None if self.text is None else self.text[item_ids[rows, lengths - 1]])

    def _padded(self, item_ids: Tensor) -> Tensor:
        """All max_len slots: the padded spectrum transforms them, the valid one does not see them."""
        return F.pad(item_ids, (0, self.config.max_len - item_ids.shape[1]))

    def _embed(self, item_ids: Tensor) -> Tensor:
        return self.input_norm(self.dropout(self.item_embedding(item_ids)))
