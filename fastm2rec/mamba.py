"""The Mamba-1 block, with the low-pass filter's place inside it, for all positions or for the last one.

Parameters, their names, shapes and start values are those of `fastm2rec.reference.mamba.Mamba`, hence of
`mamba_ssm.Mamba`: a state_dict of either loads into the other.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .impl import silu_in_scan
from .reference.last_scan import slowest_first
from .reference.mamba import Mamba as ReferenceMamba
from .reference.positions import take
from .spectral import SpectralFilter

Linear: TypeAlias = tuple[Tensor, Tensor | None]  # weight and bias


class Mamba(ReferenceMamba):
    """`u, z = in_proj(x); u = silu(filter(conv(u))); out_proj(scan(u) * silu(z))` (arXiv 2312.00752 section 3.4).

    Args:
        d_model: D, width of the input and the output.
        d_state: N, states per channel.
        d_conv: taps of the causal convolution.
        expand: d_inner = expand * d_model.
        dt_rank: rank of the step-size projection, "auto" for ceil(d_model / 16).
        conv_bias: does the convolution have a bias?
        bias: do in_proj and out_proj have one?
        scan_norm: LayerNorm on the scan's output, named `norm`.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        lengths: Tensor,
        filter: SpectralFilter | None = None,
        inner: bool = True,
        impl: str = "auto",
    ) -> Tensor:
        """All positions: x [B, L, D], right-padded rows of `lengths` [B], to [B, L, D].

        Args:
            x: [B, L, D].
            lengths: [B] int64, 1 to L.
            filter: the low-pass filter, or None.
            inner: the filter is applied between convolution and SiLU, and z is not filtered; else it is applied to x.
            impl: which implementation of the ops.
        """
        if filter is not None and not inner:  # z needs the filtered sequence at every position, too
            x, filter = filter(x, lengths, impl), None
        makes_u, makes_z = self._halves()
        u = self._convolved(x, lengths, filter, inner, makes_u, "silu", impl).transpose(1, 2)
        z = F.linear(x, *makes_z)
        delta, B, C = self.x_proj(u.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = ops.selective_scan(
            u,
            self._delta(delta),
            self._state_matrix(),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            z=None if self.scan_norm else z.transpose(1, 2),
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            impl=impl,
        )
        assert isinstance(y, Tensor)
        y = y.transpose(1, 2)
        if self.scan_norm:
            y = self.norm(y) * F.silu(z)
        return self.out_proj(y)

    def last(
        self,
        x: Tensor,
        lengths: Tensor,
        newest: Tensor,
        filter: SpectralFilter | None = None,
        inner: bool = True,
        stride: int = 1,
        impl: str = "auto",
    ) -> Tensor:
        """What `out_proj` takes at the last real position: x [B, L, D] to [B, E]; arguments as of `forward`.

        z, C and D u are computed there alone, and the scan in closed form.

        Args:
            newest: x at each row's last real position, [B, D].
            stride: scan every stride-th position, counted back from the last real one.
        """
        if filter is not None and not inner:
            newest = filter.last(x, lengths)
        makes_u, makes_z = self._halves()
        z = F.linear(newest, *makes_z)
        gate = None if self.scan_norm else z
        if silu_in_scan(impl, x.device):
            y = self._last_scan(x, gate, lengths, filter, inner, makes_u, stride, impl)
        else:
            u = self._convolved(x, lengths, filter, inner, makes_u, "silu", impl)
            y = self._last_state(u, gate, lengths, stride, impl)
        if self.scan_norm:
            y = self.norm(y) * F.silu(z)
        return y

    def _last_scan(
        self,
        x: Tensor,
        z: Tensor | None,
        lengths: Tensor,
        filter: SpectralFilter | None,
        inner: bool,
        makes_u: Linear,
        stride: int,
        impl: str,
    ) -> Tensor:
        """Convolution, filter, SiLU and scan at the last position, for z [B, E] or None: [B, E]."""
        A = self._state_matrix()
        x_proj, dt_proj, dt_bias = self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias
        if filter is not None and inner and filter.multiplies(x.shape[1]):
            basis, gain = filter.columns(x, lengths)
            return ops.filtered_last_scan(
                x, lengths, basis, gain, *self._input_weights(makes_u, None), x_proj, dt_proj, dt_bias, A, self.D, z,
                stride, impl=impl,
            )  # fmt: skip
        # The scan skips what a whole tile of channels has forgotten, so it gets them in the order of their decay: that
        # is cheap to do to the weights.
        order = slowest_first(A, dt_bias)
        p = self._convolved(x, lengths, filter, inner, makes_u, None, impl, order)
        return ops.last_scan(p, x_proj, dt_proj, dt_bias, A, self.D, z, lengths, stride, order, impl=impl)

    def _last_state(self, u: Tensor, z: Tensor | None, lengths: Tensor, stride: int, impl: str) -> Tensor:
        """The scan at the last position from u [B, L, E] after SiLU: [B, E]."""
        u, lengths = subsample(u, lengths, stride)
        states = self.dt_rank + self.d_state
        delta, B = F.linear(u, self.x_proj.weight[:states]).split([self.dt_rank, self.d_state], dim=-1)
        return ops.last_state(
            u.transpose(1, 2),
            self._delta(delta),
            self._state_matrix(),
            B.transpose(1, 2),
            F.linear(take(u, lengths - 1), self.x_proj.weight[states:]),
            self.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            lengths=lengths,
            impl=impl,
        )

    def _halves(self) -> tuple[Linear, Linear]:
        """The parts of in_proj that make u and z."""
        u, z = self.in_proj.weight.chunk(2)
        bias_u, bias_z = (None, None) if self.in_proj.bias is None else self.in_proj.bias.chunk(2)
        return (u, bias_u), (z, bias_z)

    def _state_matrix(self) -> Tensor:
        """The state matrix (dim, dstate), negative, float32 at least."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _delta(self, low_rank: Tensor) -> Tensor:
        """Step sizes before bias and softplus, [B, L, dt_rank] to (B, dim, L)."""
        return F.linear(low_rank, self.dt_proj.weight).transpose(1, 2)

    def _input_weights(
        self, makes_u: Linear, order: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Weight and bias of what makes u, then of the convolution, their channels in this order."""
        in_weight, in_bias = makes_u
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if order is None:
            return in_weight, in_bias, weight, bias
        in_bias, bias = (None if b is None else b[order] for b in (in_bias, bias))
        return in_weight[order], in_bias, weight[order], bias

    def _convolved(
        self,
        x: Tensor,
        lengths: Tensor,
        filter: SpectralFilter | None,
        inner: bool,
        makes_u: Linear,
        activation: Literal["silu"] | None,
        impl: str,
        order: Tensor | None = None,
    ) -> Tensor:
        """The scan's input u, or without the activation what SiLU makes it of: x [B, L, D] to [B, L, E].

        Channel e of it is channel `order[e]` of the block, where an order is given.
        """
        in_weight, in_bias, weight, bias = self._input_weights(makes_u, order)
        if filter is not None:
            return filter.project(x, lengths, in_weight, in_bias, weight, bias, inner, activation, impl)
        u = F.linear(x, in_weight, in_bias).transpose(1, 2)
        return ops.causal_conv1d(u, weight, bias, activation, impl=impl).transpose(1, 2)


def subsample(x: Tensor, lengths: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Every stride-th position of each row, counted back from its last real one, in order and right-padded.

    x [B, L, C] and lengths [B] to [B, ceil(L / stride), C] and the new lengths ceil(lengths / stride).
    """
    if stride == 1:
        return x, lengths
    kept = (lengths + stride - 1).div(stride, rounding_mode="floor")
    slots = -(-x.shape[1] // stride)
    order = kept.unsqueeze(1) - 1 - torch.arange(slots, device=x.device)  # 0 for a row's last, negative in its padding
    positions = (lengths.unsqueeze(1) - 1 - stride * order).clamp(max=x.shape[1] - 1)
    return x.gather(1, positions.unsqueeze(2).expand(-1, -1, x.shape[2])), kept
