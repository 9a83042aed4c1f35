"""The Mamba-1 block (arXiv 2312.00752, Figure 3), with the place where M2Rec puts its filter.

    u, z = in_proj(x);  u = silu(filter(causal_conv1d(u)));  delta, B, C = x_proj(u);  delta = softplus(dt_proj(delta))
    y = selective_scan(u, delta, A, B, C, D) * silu(z);  out_proj(y)

    D = d_model   E = d_inner = expand * d_model   N = d_state   J = d_conv   dt_rank = ceil(D / 16)

Parameter names, shapes and start values are those of `mamba_ssm.Mamba`: a state_dict of either loads into the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_conv1d import causal_conv1d
from .selective_scan import selective_scan

# Mamba draws its first step sizes log-uniformly between these.
DT_MIN, DT_MAX, DT_FLOOR = 0.001, 0.1, 1e-4


class Mamba(nn.Module):
    """The block.

    Args:
        d_model, d_state, d_conv, expand: sizes.
        dt_rank: rank of the step-size projection; "auto" is ceil(d_model / 16).
        conv_bias: does the convolution have a bias?
        bias: do in_proj and out_proj have one?
        scan_norm: LayerNorm on the scan's output before the output gate (M2Rec's figure; not in mamba_ssm).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        scan_norm: bool = False,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_state = d_state
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.scan_norm = scan_norm

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        # A container for parameters of the usual names: the convolution itself is ops' business.
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        if scan_norm:
            self.norm = nn.LayerNorm(self.d_inner, eps=1e-12)
        self._start_step_sizes()

    @torch.no_grad()
    def _start_step_sizes(self) -> None:
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        steps = torch.exp(low + (high - low) * torch.rand(self.d_inner)).clamp(min=DT_FLOOR)
        self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of this is `steps`

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        filter: Callable[[Tensor], Tensor] | None = None,
        stride: int = 1,
    ) -> Tensor:
        """x [B, L, D], right-padded rows of `lengths` [B], to [B, L, D].

        Args:
            filter: applied to the convolution's output [B, L, E], before SiLU; z is not filtered.
            stride: scan every stride-th position, counted back from each row's last real one; the result is then
                [B, ceil(L / stride), D], right-padded.
        """
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = causal_conv1d(u.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias).transpose(1, 2)
        u = F.silu(u if filter is None else filter(u))
        if stride > 1:
            if lengths is None:
                lengths = torch.full((x.shape[0],), x.shape[1], device=x.device)
            u, z = every(u, lengths, stride), every(z, lengths, stride)
        delta, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan(
            u.transpose(1, 2),
            F.linear(delta, self.dt_proj.weight).transpose(1, 2),
            -torch.exp(self.A_log),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)
        y = y.transpose(1, 2)
        if self.scan_norm:
            y = self.norm(y)
        return self.out_proj(y * F.silu(z))


def every(x: Tensor, lengths: Tensor, stride: int) -> Tensor:
    """Positions lengths - 1, lengths - 1 - stride, ... of each row of x [B, L, C], in order and right-padded with 0."""
    result = x.new_zeros(x.shape[0], -(-x.shape[1] // stride), x.shape[2])
    for row, n in enumerate(lengths.tolist()):
        kept = x[row, (n - 1) % stride : n : stride]
        result[row, : len(kept)] = kept
    return result
