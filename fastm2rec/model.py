"""M2Rec: item embeddings, the encoder (filter, Mamba, feed-forward), and the gate that mixes in the item's text.

`M2RecEncoder` is the part that other frameworks can take for their Transformer: embeddings in, embeddings out.
`M2Rec` is the whole recommender; without filter and gate it is Mamba4Rec.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from ._values import readable
from .base import SequentialRecommender, check_lengths
from .config import M2RecConfig
from .layer import LAYER_NORM_EPS, Layer, is_plain
from .reference.gated_fusion import scale_text

INIT_STD = 0.02

PaddingSide = Literal["right", "left"]


class M2RecEncoder(nn.Module):
    """A stack of filter + Mamba layers over a batch of embedded sequences: a drop-in for a Transformer encoder.

    The low-pass filter is not causal: train it on prefixes with the loss at the last position. A loss at every position
    leaks the answer, which lies in the part of the sequence that the filter has already seen.

    Args:
        config: sizes and filter; `n_items`, `text_dim` and the gate are not used here. None takes the defaults.
        **fields: fields of `M2RecConfig` on top of `config`.
    """

    def __init__(self, config: M2RecConfig | None = None, **fields: Any) -> None:
        super().__init__()
        values = {**(config.to_dict() if config is not None else {}), **fields}
        self.config = config = M2RecConfig.from_dict(values)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        initialise(self, config)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        padding_side: PaddingSide = "right",
        output: Literal["all", "last"] = "all",
        impl: str = "auto",
    ) -> Tensor:
        """Encode a padded batch.

        Args:
            x: [B, L, D] floating point, embeddings in time order; what stands in padding slots does not matter.
            lengths: [B] integers, 1 to L: real positions of each row. Give this or `key_padding_mask`; neither means
                that all L are real.
            key_padding_mask: [B, L] bool, True at padding, as in `torch.nn.TransformerEncoder`.
            padding_side: where the padding is. The results are the same, at the mirrored places.
            output: "all" for every position, "last" for the last real one of each row (less work).
            impl: which implementation of the ops runs.

        Returns:
            [B, L, D] (padding slots hold zeros) or [B, D].

        Raises:
            ValueError: wrong shapes, lengths outside 1..L, a mask that is not one block of padding on `padding_side`,
                or `output="all"` with a stride above 1, where most positions are never computed.
            TypeError: x is not floating point, lengths are not integers, or the mask is not boolean.
        """
        lengths = self._lengths(x, lengths, key_padding_mask, padding_side)
        if output not in ("all", "last"):
            raise ValueError(f"output: expected 'all' or 'last', got {output!r}")
        if padding_side == "left":
            x = roll_rows(x, lengths - x.shape[1])
        x = x.masked_fill(padding_of(x, lengths), 0.0)
        y = self.run(x, lengths, last=output == "last", impl=impl)
        if padding_side == "left" and output == "all":
            y = roll_rows(y, x.shape[1] - lengths)
        return y

    def run(
        self, x: Tensor, lengths: Tensor, *, last: bool, impl: str = "auto", newest: Tensor | None = None
    ) -> Tensor:
        """`forward` for right-padded input that is known to be sound, and zero at padding; `newest` as of `Layer`."""
        if self.config.stride > 1 and not last:
            raise ValueError(f"output: expected 'last' with stride={self.config.stride}, got 'all'")
        *inner, final = self.layers
        for layer in inner:
            x = layer(x, lengths, last=False, stride=1, impl=impl).masked_fill(padding_of(x, lengths), 0.0)
        newest = None if inner else newest
        x = final(x, lengths, last=last, stride=self.config.stride, impl=impl, newest=newest)
        return x if last else x.masked_fill(padding_of(x, lengths), 0.0)

    def _lengths(
        self, x: Tensor, lengths: Tensor | None, key_padding_mask: Tensor | None, padding_side: PaddingSide
    ) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"x: expected floating-point embeddings, got {x.dtype}")
        if x.dim() != 3 or x.shape[2] != self.config.d_model or x.shape[1] == 0:
            raise ValueError(f"x: expected shape [B, L, {self.config.d_model}] with L >= 1, got {list(x.shape)}")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side: expected 'right' or 'left', got {padding_side!r}")
        batch, seqlen = x.shape[:2]
        if key_padding_mask is not None:
            if lengths is not None:
                raise ValueError("key_padding_mask: expected None where lengths are given, got a tensor")
            if key_padding_mask.dtype != torch.bool:
                raise TypeError(f"key_padding_mask: expected bool, True at padding, got {key_padding_mask.dtype}")
            if key_padding_mask.shape != (batch, seqlen):
                raise ValueError(
                    f"key_padding_mask: expected shape [{batch}, {seqlen}], got {list(key_padding_mask.shape)}"
                )
            lengths = (~key_padding_mask).sum(dim=1)
            if readable(x):
                slot = torch.arange(seqlen, device=x.device)
                expected = (
                    slot >= lengths.unsqueeze(1) if padding_side == "right" else slot < (seqlen - lengths)[:, None]
                )
                if not torch.equal(key_padding_mask, expected):
                    raise ValueError(
                        f"key_padding_mask: expected each row's padding in one block on the {padding_side}"
                    )
        elif lengths is None:
            lengths = torch.full((batch,), seqlen, dtype=torch.int64, device=x.device)
        check_lengths(lengths, batch, seqlen)
        return lengths.to(device=x.device, dtype=torch.int64)


def padding_of(x: Tensor, lengths: Tensor) -> Tensor:
    """Where x [B, L, C] has padding: [B, L, 1]."""
    return (torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)).unsqueeze(2)


class Fusion(nn.Module):
    """The gate of arXiv 2505.04445 Eq. 16 and its variants: `Y = Linear(alpha * text_proj(text) + beta * h) [+ h]`."""

    def __init__(self, config: M2RecConfig) -> None:
        super().__init__()
        d = config.d_model
        self.gate = config.gate
        self.residual = config.gate_residual
        if config.uses_text:
            self.text_proj = nn.Linear(config.text_dim, d)
        if config.gate == "context":
            self.gate_proj = nn.Linear(2 * d, 2 * d)
        elif config.uses_text:
            shape = () if config.gate == "scalar" else (d,)
            self.alpha = nn.Parameter(torch.full(shape, 0.5))
            self.beta = nn.Parameter(torch.full(shape, 0.5))
        self.linear = nn.Linear(d, d)

    def forward(self, h: Tensor, text: Tensor | None, ids: Tensor, impl: str) -> Tensor:
        """The encoder's output and the text of the last items, mixed.

        Args:
            h: [B, D].
            text: the text table [n_items + 1, T], or None without text.
            ids: [B] int64, each row's last item.
            impl: which implementation of the op.

        Returns:
            [B, D].
        """
        projected, rows = None, None
        if text is not None:
            if len(ids) < len(text):  # T is wide: the fewer rows are projected
                projected = self.text_proj(text.index_select(0, ids))
            else:
                projected, rows = self.text_proj(text), ids
        context = self.gate == "context"
        constant = text is not None and not context
        return ops.gated_fusion(
            h,
            projected,
            self.alpha if constant else None,
            self.beta if constant else None,
            self.linear.weight,
            self.linear.bias,
            ids=rows,
            gate_weight=self.gate_proj.weight if context else None,
            gate_bias=self.gate_proj.bias if context else None,
            residual=self.residual,
            impl=impl,
        )


class M2Rec(SequentialRecommender):
    """The M2Rec next-item recommender (arXiv 2505.04445).

    Args:
        config: what to build; `n_items` must be at least 1.
        text: frozen text embeddings [n_items + 1, T], row 0 (padding) and the rows of items without text zero. Needed
            exactly when the gate reads text. Kept, scaled, as the buffer `text`.
        impl: which implementation of the ops runs; see `fastm2rec.impl.names()`.

    Raises:
        ValueError: n_items of 0, a text table of the wrong shape or with NaN, or one missing or superfluous.
    """

    config: M2RecConfig

    def __init__(self, config: M2RecConfig, text: Tensor | None = None, impl: str = "auto") -> None:
        super().__init__()
        if config.n_items < 1:
            raise ValueError(f"n_items: expected at least 1, got {config.n_items}")
        self.config = config
        self.impl = impl
        self.item_embedding = nn.Embedding(config.n_items + 1, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.input_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.encoder = M2RecEncoder(config)
        self.text: Tensor | None
        self.register_buffer("text", self._text_table(text))
        if config.gate != "none":
            self.fusion = Fusion(config)
        initialise(self, config)

    def _text_table(self, text: Tensor | None) -> Tensor | None:
        config = self.config
        if not config.uses_text:
            if text is not None:
                raise ValueError(f"text: expected None with gate={config.gate!r}, which reads no text, got a tensor")
            return None
        if config.text_dim < 1:
            raise ValueError(f"text_dim: expected at least 1 with gate={config.gate!r}, got {config.text_dim}")
        shape = (config.n_items + 1, config.text_dim)
        if text is None:
            raise ValueError(
                f"text: expected a table of shape {list(shape)} with gate={config.gate!r}, got None; "
                "gate='linear' or gate='none' build the model without text"
            )
        if tuple(text.shape) != shape or not text.is_floating_point():
            raise ValueError(
                f"text: expected a floating-point table of shape [n_items + 1, text_dim] = {list(shape)}, "
                f"got {text.dtype} of shape {list(text.shape)}"
            )
        if not torch.isfinite(text).all():
            raise ValueError("text: expected finite values, got NaN or infinity")
        if text[0].any():
            raise ValueError("text: expected row 0, which stands for padding, to be zero")
        return scale_text(text.detach().float(), config.text_scale)

    @property
    def is_causal(self) -> bool:
        return self.config.is_causal

    @property
    def item_weight(self) -> Tensor:
        return self.item_embedding.weight

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        item_ids, lengths = self.check_batch(item_ids, lengths)
        x, newest = self._embed(item_ids, lengths)
        h = self.encoder.run(x, lengths, last=True, impl=self.impl, newest=newest)
        if self.config.gate == "none":
            return h
        last = item_ids.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)
        return self.fusion(h, self.text, last, self.impl)

    def hidden(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        item_ids, lengths = self.check_batch(item_ids, lengths)
        seqlen = item_ids.shape[1]
        h = self.encoder.run(self._embed(item_ids, lengths)[0], lengths, last=False, impl=self.impl)[:, :seqlen]
        if self.config.gate == "none":
            return h
        return self.fusion(h.flatten(0, 1), self.text, item_ids.flatten(), self.impl).unflatten(0, item_ids.shape)

    def _embed(self, item_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded, normalised items [B, L, D], zero at padding, and each row's last [B, D].

        L is max_len where the filter transforms all slots.
        """
        config = self.config
        missing = config.max_len - item_ids.shape[1]
        if missing and config.filter_placement != "none" and config.spectrum == "padded":
            item_ids = F.pad(item_ids, (0, missing))
        norm, dropout = self.input_norm, self.dropout.p if self.training else 0.0
        module = self.item_embedding
        if is_plain(module, nn.Embedding):
            table = module.weight
        else:  # it makes the vectors
            table = module(item_ids).flatten(0, 1)
            item_ids = torch.arange(len(table), device=table.device).view_as(item_ids)
        return ops.embed_norm(item_ids, lengths, table, norm.weight, norm.bias, norm.eps, dropout, impl=self.impl)


def initialise(module: nn.Module, config: M2RecConfig) -> None:
    """Draw the start values: N(0, 0.02) for every Linear and Embedding, as Mamba4Rec's released code does.

    That includes dt_proj and its bias unless `config.init` is "mamba". The convolution, A_log and D keep Mamba's.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=INIT_STD)
        elif isinstance(child, nn.Linear) and not (config.init == "mamba" and name.endswith("dt_proj")):
            nn.init.normal_(child.weight, std=INIT_STD)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def roll_rows(x: Tensor, shifts: Tensor) -> Tensor:
    """Each row b of x [B, L, C] moved by shifts[b] positions along L, around the end."""
    seqlen = x.shape[1]
    source = (torch.arange(seqlen, device=x.device) - shifts.unsqueeze(1)) % seqlen
    return x.gather(1, source.unsqueeze(2).expand_as(x))
