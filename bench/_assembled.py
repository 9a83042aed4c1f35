"""M2Rec and Mamba4Rec as one would put them together today: every position computed, torch.fft, somebody's scan.

With mamba-ssm's CUDA scan and causal-conv1d's convolution where they are installed, and with the plain loop of the
specification. These are the peers that the kernels here have to beat.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastm2rec import _mamba_ssm
from fastm2rec.base import SequentialRecommender
from fastm2rec.config import M2RecConfig
from fastm2rec.reference.m2rec import M2Rec as ReferenceM2Rec
from fastm2rec.reference.mamba import Mamba, every


class CudaMamba(Mamba):
    """The block on mamba-ssm's scan and causal-conv1d's convolution; the same parameters and result.

    As in mamba_ssm's own block, products write the layout that those kernels read: [B, C, L] with time innermost. The
    filter's transforms take and leave it so as well.
    """

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        filter: Callable[[Tensor], Tensor] | None = None,
        stride: int = 1,
    ) -> Tensor:
        u, z = _time_innermost(x, self.in_proj).chunk(2, dim=1)
        activation = "silu" if filter is None else None  # the convolution's kernel applies it where nothing intervenes
        u = _mamba_ssm.causal_conv1d(u, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation)
        if filter is not None:
            u = F.silu(filter(u.transpose(1, 2))).transpose(1, 2)
        if stride > 1:
            assert lengths is not None
            u, z = (every(part.transpose(1, 2), lengths, stride).transpose(1, 2) for part in (u, z))
        delta, B, C = self.x_proj(u.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = _mamba_ssm.selective_scan(
            u, _time_innermost(delta, self.dt_proj, with_bias=False), -torch.exp(self.A_log.float()),
            B.transpose(1, 2), C.transpose(1, 2), self.D, None if self.scan_norm else z, self.dt_proj.bias, True,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        y = y.transpose(1, 2)
        return self.out_proj(self.norm(y) * F.silu(z.transpose(1, 2)) if self.scan_norm else y)


def _time_innermost(x: Tensor, linear: nn.Linear, with_bias: bool = True) -> Tensor:
    """linear(x) of x [B, L, D] as [B, E, L], by one product that leaves it in memory as [E, B, L]."""
    batch, length, _ = x.shape
    y = (linear.weight @ x.reshape(batch * length, -1).t()).unflatten(1, (batch, length)).transpose(0, 1)
    return y if linear.bias is None or not with_bias else y + linear.bias[:, None]


def kinds(model: str, device: torch.device) -> list[tuple[str, str, str | None]]:
    """What there is for `model`: its name in the table, the scan, and why it cannot run on `device`."""
    before = "torch.fft" if model == "m2rec" else "torch"
    reason = "mamba-ssm's scan runs on CUDA devices only" if device.type != "cuda" else _mamba_ssm.missing()
    return [(f"{before} + loop", "loop", None), (f"{before} + mamba_ssm", "mamba_ssm", reason)]


def like(model: SequentialRecommender, kind: str) -> ReferenceM2Rec:
    """The weights of `model`, in its dtype and on its device, in evaluation mode; parameters of its own.

    Args:
        model: an `M2Rec` of this package.
        kind: "loop" or "mamba_ssm".
    """
    config = model.config
    assert isinstance(config, M2RecConfig)
    made = ReferenceM2Rec(config)
    if kind == "mamba_ssm":
        sizes = (config.d_model, config.d_state, config.d_conv, config.expand, config.resolved_dt_rank)
        for layer in made.encoder.layers:
            layer.mamba = CudaMamba(*sizes, scan_norm=config.scan_norm)
    state = {key: value.detach().clone() for key, value in model.state_dict().items() if key != "text"}
    made.load_state_dict(state, assign=True)
    made.text = model.get_buffer("text") if config.uses_text else None
    return made.eval()
