"""One layer of M2Rec: filter, Mamba, feed-forward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .config import M2RecConfig
from .mamba import Mamba
from .reference.positions import with_one
from .spectral import SpectralFilter

LAYER_NORM_EPS = 1e-12


class FeedForward(nn.Module):
    """`LayerNorm(x + Dropout(fc2(Dropout(gelu(fc1(x))))))`."""

    def __init__(self, config: M2RecConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.ffn_mult * config.d_model)
        self.fc2 = nn.Linear(config.ffn_mult * config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(F.gelu(self.fc1(x)))
        return self.norm(x + self.dropout(self.fc2(hidden)))


class Layer(nn.Module):
    """Filter, Mamba, feed-forward: one layer of Mamba4Rec (arXiv 2403.03900) with M2Rec's filter."""

    def __init__(self, config: M2RecConfig) -> None:
        super().__init__()
        self.placement = config.filter_placement
        self.residual = config.n_layers > 1
        if config.filter_placement != "none":
            self.filter = SpectralFilter(config)
        self.mamba = Mamba(
            config.d_model,
            config.d_state,
            config.d_conv,
            config.expand,
            config.resolved_dt_rank,
            scan_norm=config.scan_norm,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.ffn = FeedForward(config)

    def forward(
        self, x: Tensor, lengths: Tensor, *, last: bool, stride: int, impl: str, newest: Tensor | None = None
    ) -> Tensor:
        """x [B, L, D], zero at padding, to [B, L, D], or with `last` to [B, D].

        `newest` is x at each row's last real position, where the caller has it.
        """
        filter = None if self.placement == "none" else self.filter
        inner = self.placement == "inner"
        if last:
            if newest is None:
                x, newest = with_one(x, lengths - 1)
            y, x = self.mamba.last(x, lengths, newest, filter, inner, stride, impl), newest
            if self._is_plain():
                return self._output(y, x, impl)
            y = self.mamba.out_proj(y)
        else:
            y = self.mamba(x, lengths, filter, inner, impl)
        y = self.dropout(y)
        return self.ffn(self.norm(y + x if self.residual else y))

    def _is_plain(self) -> bool:
        """Are the modules behind the scan as they were built, so that one op may stand for them?"""
        ffn, norms, dropouts = self.ffn, (self.norm, self.ffn.norm), (self.dropout, self.ffn.dropout)
        return (
            is_plain(ffn, FeedForward)
            and all(is_plain(module, nn.Linear) for module in (self.mamba.out_proj, ffn.fc1, ffn.fc2))
            and all(is_plain(norm, nn.LayerNorm) and norm.bias is not None for norm in norms)
            and all(is_plain(dropout, nn.Dropout) for dropout in dropouts)
            and norms[0].eps == norms[1].eps
            and dropouts[0].p == dropouts[1].p
            and dropouts[0].training == dropouts[1].training
        )

    def _output(self, y: Tensor, x: Tensor, impl: str) -> Tensor:
        """The layer's output from the scan's at the last position, y [B, E], and its input there, x [B, D]."""
        out_proj, norm, ffn = self.mamba.out_proj, self.norm, self.ffn
        return ops.output_ffn(
            y,
            x if self.residual else None,
            out_proj.weight,
            out_proj.bias,
            norm.weight,
            norm.bias,
            ffn.fc1.weight,
            ffn.fc1.bias,
            ffn.fc2.weight,
            ffn.fc2.bias,
            ffn.norm.weight,
            ffn.norm.bias,
            norm.eps,
            self.dropout.p if self.dropout.training else 0.0,
            impl=impl,
        )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Is it of that very class and has no hook? What was put in its place, or hooked on to it, has work to do."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
