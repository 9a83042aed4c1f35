"""A trained one-layer M2Rec folded for inference: everything that does not depend on the sequence is worked out once.

* In evaluation mode an embedded item depends on its id alone, and up to the convolution the block is linear. So
  embedding, LayerNorm and in_proj become two tables of [n_items + 1, E], and no position is multiplied by in_proj.
* The filter becomes data: basis, gains, and what the convolution's bias leaves in each column.
* The output's Linear takes in the gate's numbers and text_proj: one table of the items' texts, [n_items + 1, D].

`ops.encode_last` goes from item ids to query vectors with this. The price is memory: 2 E + D numbers an item.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .basis import column_frequencies, mask_gain, n_columns, row_basis
from .config import FilterPlacement, M2RecConfig
from .impl import AUTO
from .kernels._nodes import EXPONENTIALS, Nodes, accepted, fit_nodes
from .layer import LAYER_NORM_EPS, Layer
from .model import M2Rec

# Kernels take up to this many columns in one tile, and more of them in tiles of this many.
COLUMN_TILE = 64

# These are operands of matrix products, or tables; they take the dtype that is asked for. What is left is small, and is
# never in half precision.
_WIDE = (
    "u_table", "z_table", "basis", "step_down", "step_up", "B_weight", "C_weight", "out_proj", "fc1", "fc2",
    "mix", "text_table", "gate_weight", "gate_table",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Folded:
    """The bundle. Matrices are stored as they are applied: `x @ weight`.

    Symbols: D = d_model, E = d_inner, N = d_state, L = max_len, R basis columns (padded with zeros to whole tiles),
    J = d_conv, H = ffn_mult * D, I = n_items. The spectra: S = 1 (padded), or S = L, one per row length (valid).

    Args:
        placement: where the filter sits; "none" also where it keeps every frequency.
        stride: every stride-th position is scanned, counted back from the last real one.
        max_len: L, the slots that the padded spectrum transforms.
        gate: "none", "linear" (output Linear without text), "constant" or "context".
        residual: add the encoder's output to the gate's.
        eps: of every LayerNorm.
        exponentials: "exact"; "nodes", the separable approximation of `kernels/_nodes.py`; or "auto": nodes for half
            precision where their fit passes, else exact. Kernels only.
        splits: programs that share a row's positions, for small batches. Kernels only.
        u_table: [I + 1, E], the scan's branch of in_proj for each item; row 0, padding, is zero.
        z_table: [I + 1, E], likewise the output gate's branch.
        taps: [J, E], the convolution's weight at a delay of 0, 1, ... positions.
        conv_bias: [E].
        basis: V, [S, L, R], or None.
        gain: m, [S, R], or None.
        offset: [S, R], m times the columns' sums: where a constant over the slots goes. None without "inner".
        last_weights: [L, L], row n - 1 is what the filter makes of the slots at position n - 1 of a row of length n.
            None without "input".
        step_down: [E, dt_rank], and step_up [dt_rank, E] and step_bias [E]: the step size before softplus.
        B_weight: [E, N], and C_weight [E, N].
        A: [N, E], negative.
        D: [E], the skip connection.
        scan_norm_weight: [E], and scan_norm_bias [E], or None.
        out_proj: [E, D].
        norm_weight: [D], and norm_bias [D].
        fc1: [D, H], fc1_bias [H], fc2 [H, D], fc2_bias [D], ffn_norm_weight [D], ffn_norm_bias [D].
        mix: [D, D], what the output's Linear makes of the encoder's output, and mix_bias [D]; None without a gate.
        text_table: [I + 1, D]: what the output's Linear makes of the item's text ("constant"), or the projected text
            ("context"), or None.
        gate_weight: [D, 2 D], the encoder's output's part of the context gates (text's, then its own), or None.
        gate_table: [I + 1, 2 D], the text's part, with the bias, or None.
        nodes: the fit of A.
    """

    placement: FilterPlacement
    stride: int
    max_len: int
    gate: Literal["none", "linear", "constant", "context"]
    residual: bool
    eps: float
    exponentials: str
    splits: int
    u_table: Tensor
    z_table: Tensor
    taps: Tensor
    conv_bias: Tensor
    basis: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    last_weights: Tensor | None
    step_down: Tensor
    step_up: Tensor
    step_bias: Tensor
    B_weight: Tensor
    C_weight: Tensor
    A: Tensor
    D: Tensor
    scan_norm_weight: Tensor | None
    scan_norm_bias: Tensor | None
    out_proj: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    ffn_norm_weight: Tensor
    ffn_norm_bias: Tensor
    mix: Tensor | None
    mix_bias: Tensor | None
    text_table: Tensor | None
    gate_weight: Tensor | None
    gate_table: Tensor | None
    nodes: Nodes

    @property
    def dtype(self) -> torch.dtype:
        """Of the tables and matrices, and of the query vectors."""
        return self.u_table.dtype

    @property
    def device(self) -> torch.device:
        return self.u_table.device

    @property
    def n_items(self) -> int:
        return len(self.u_table) - 1

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without those that are None."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    @functools.cached_property
    def _all(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors().values())

    @property
    def requires_grad(self) -> bool:
        """Does one of the tensors?"""
        return any(tensor.requires_grad for tensor in self._all)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Folded:
        """The bundle elsewhere, or in another dtype: half precision is for tables and matrices, the rest is float32."""
        device, dtype = torch.device(device or self.device), dtype or self.dtype
        small = torch.promote_types(dtype, torch.float32)
        moved: dict[str, Any] = {
            name: tensor.to(device, dtype if name in _WIDE else small) for name, tensor in self.tensors().items()
        }
        return dataclasses.replace(self, **moved, nodes=self.nodes.to(device))


class FoldedM2Rec:
    """A one-layer `M2Rec` for inference: its weights at the time of folding, without gradients or dropout.

    Args:
        model: the trained model; it is not changed, and later changes to it are not seen.
        impl: which implementation of `ops.encode_last` runs.
        exponentials: as `fold`.
        splits: as `fold`.

    Raises:
        ValueError: as `fold`.
    """

    def __init__(self, model: M2Rec, impl: str = AUTO, *, exponentials: str = "auto", splits: int = 1) -> None:
        self.config: M2RecConfig = model.config
        self.folded = fold(model, exponentials=exponentials, splits=splits)
        self.impl = impl

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FoldedM2Rec:
        """This model, moved in place and returned; see `Folded.to`."""
        self.folded = self.folded.to(device, dtype)
        return self

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """The query vectors, as `M2Rec.encode` computes them in evaluation mode: [B, D].

        Raises:
            TypeError, ValueError: as `ops.encode_last`.
        """
        return ops.encode_last(item_ids, lengths, self.folded, impl=self.impl)

    __call__ = encode


@torch.no_grad()
def fold(model: M2Rec, *, exponentials: str = "auto", splits: int = 1) -> Folded:
    """Fold a model; products are taken in float32 at least, results stored in the dtype of the model's parameters.

    Args:
        model: an `M2Rec` with one layer.
        exponentials: "exact", "nodes" or "auto"; see `Folded`.
        splits: programs that share a row's positions; see `Folded`.

    Raises:
        ValueError: more than one layer, or an argument out of range. With "nodes", a fit that is not good enough.
    """
    config = model.config
    if config.n_layers != 1:
        raise ValueError(f"n_layers: expected 1 for a model that can be folded, got {config.n_layers}")
    if exponentials not in EXPONENTIALS:
        raise ValueError(f"exponentials: expected one of {', '.join(EXPONENTIALS)}, got {exponentials!r}")
    if not isinstance(splits, int) or splits < 1:
        raise ValueError(f"splits: expected an integer of at least 1, got {splits!r}")
    dtype = model.item_embedding.weight.dtype
    small = torch.promote_types(dtype, torch.float32)

    def wide(parameter: Tensor) -> Tensor:
        return parameter.detach().to(small, copy=True)

    layer = model.encoder.layers[0]
    assert isinstance(layer, Layer)
    mamba = layer.mamba
    assert mamba.conv1d.bias is not None
    norm = model.input_norm
    items = F.layer_norm(
        wide(model.item_embedding.weight), (config.d_model,), wide(norm.weight), wide(norm.bias), LAYER_NORM_EPS
    )
    items[0] = 0.0
    u_weight, z_weight = wide(mamba.in_proj.weight).chunk(2)
    rank, states = config.resolved_dt_rank, config.d_state
    step_down, B_weight, C_weight = wide(mamba.x_proj.weight).t().split([rank, states, states], dim=1)
    conv_weight = wide(mamba.conv1d.weight).squeeze(1)
    A = -torch.exp(wide(mamba.A_log))
    nodes = fit_nodes(A)
    accepted(exponentials, nodes)
    filter = _filter(layer, config.max_len, items)
    folded = Folded(
        stride=config.stride,
        max_len=config.max_len,
        residual=config.gate_residual,
        eps=LAYER_NORM_EPS,
        exponentials=exponentials,
        splits=splits,
        u_table=items @ u_weight.t(),
        z_table=items @ z_weight.t(),
        taps=conv_weight.t().flip(0).contiguous(),
        conv_bias=wide(mamba.conv1d.bias),
        **filter,
        step_down=step_down.contiguous(),
        step_up=wide(mamba.dt_proj.weight).t().contiguous(),
        step_bias=wide(mamba.dt_proj.bias),
        B_weight=B_weight.contiguous(),
        C_weight=C_weight.contiguous(),
        A=A.t().contiguous(),
        D=wide(mamba.D),
        scan_norm_weight=wide(mamba.norm.weight) if config.scan_norm else None,
        scan_norm_bias=wide(mamba.norm.bias) if config.scan_norm else None,
        out_proj=wide(mamba.out_proj.weight).t().contiguous(),
        norm_weight=wide(layer.norm.weight),
        norm_bias=wide(layer.norm.bias),
        fc1=wide(layer.ffn.fc1.weight).t().contiguous(),
        fc1_bias=wide(layer.ffn.fc1.bias),
        fc2=wide(layer.ffn.fc2.weight).t().contiguous(),
        fc2_bias=wide(layer.ffn.fc2.bias),
        ffn_norm_weight=wide(layer.ffn.norm.weight),
        ffn_norm_bias=wide(layer.ffn.norm.bias),
        **_gate(model, wide),
        nodes=nodes,
    )
    return folded.to(dtype=dtype)


def _filter(layer: Layer, max_len: int, like: Tensor) -> dict[str, Any]:
    """The fields that the filter fills, in `like`'s dtype and on its device."""
    none = {"placement": "none", "basis": None, "gain": None, "offset": None, "last_weights": None}
    if layer.placement == "none" or layer.filter.is_identity:
        return none
    filter = layer.filter
    theta = filter.theta.double() if isinstance(filter.theta, Tensor) else filter.theta
    columns = n_columns(max_len, theta if isinstance(theta, float) else None, filter.kind)
    extra = _whole_tiles(columns) - columns
    names = ("basis", "gain", "offset" if layer.placement == "inner" else "last_weights")
    parts: list[tuple[Tensor, ...]] = []
    lengths = torch.arange(max_len if filter.spectrum == "padded" else 1, max_len + 1, device=like.device)
    for some in lengths.split(64):  # float64 bases of all lengths at once would be large
        basis = F.pad(row_basis(some, max_len, columns, filter.kind, torch.float64), (0, extra))
        frequencies = column_frequencies(some, columns, filter.kind, torch.float64)
        gain = F.pad(mask_gain(frequencies, theta, filter.mask, filter.tau), (0, extra))
        if layer.placement == "inner":
            third = gain * basis.sum(1)
        else:
            last = basis[0] if filter.spectrum == "padded" else basis[torch.arange(len(some)), some - 1]
            third = ((last * gain).unsqueeze(1) @ basis.mT).squeeze(1)
        parts.append(tuple(x.to(like.dtype) for x in (basis, gain, third)))
    found = {name: torch.cat(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}
    return {**none, "placement": layer.placement, **found}


def _whole_tiles(columns: int) -> int:
    """`columns` rounded up to what fills tiles: a power of two, at least 16, or a multiple of `COLUMN_TILE`."""
    if columns > COLUMN_TILE:
        return -(-columns // COLUMN_TILE) * COLUMN_TILE
    return max(16, 1 << (columns - 1).bit_length())


def _gate(model: M2Rec, wide: Any) -> dict[str, Any]:
    """The fields that the gate fills."""
    names = ("mix", "mix_bias", "text_table", "gate_weight", "gate_table")
    found: dict[str, Any] = {"gate": "none", **dict.fromkeys(names)}
    if model.config.gate == "none":
        return found
    fusion = model.fusion
    weight = wide(fusion.linear.weight).t()
    found.update(gate="linear", mix=weight.contiguous(), mix_bias=wide(fusion.linear.bias))
    if model.text is None:
        return found
    text = F.linear(wide(model.text), wide(fusion.text_proj.weight), wide(fusion.text_proj.bias))
    if model.config.gate == "context":
        by_text, by_state = wide(fusion.gate_proj.weight).t().chunk(2)
        gate_table = text @ by_text + wide(fusion.gate_proj.bias)
        found.update(gate="context", text_table=text, gate_weight=by_state.contiguous(), gate_table=gate_table)
        return found
    found.update(
        gate="constant",
        mix=(wide(fusion.beta).reshape(-1, 1) * weight).contiguous(),
        text_table=(wide(fusion.alpha) * text) @ weight,
    )
    return found
