"""Item ids in, query vectors out, for inference: the kernels of a folded one-layer M2Rec behind one custom op.

Up to 64 basis columns (L = 319 at theta = 0.1, and any L without a filter) it takes two launches, and no [B, L, *]
tensor is in memory: `_encode_last_scan` goes from ids to the scan's output, `_encode_last_head` on to the query.
Scratch is what a program writes for itself: the row's columns P [R, E], and C B of 32 positions. A third launch makes
z where the filter comes before in_proj, as z then needs a sum over the row. With more columns P and u [B, L, E] go
through memory (`_encode_last_rows`); step sizes, B and the exponentials still do not.

Nobody has looked at ids and lengths on a GPU: an id out of range counts as padding, a length as the nearest one, and no
program reads outside of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ._common import Arithmetic, target_arch, triton_dtype
from ._encode_last_head import encode_last_head_kernel
from ._encode_last_rows import columns_kernel, filtered_gate_kernel, rows_kernel
from ._encode_last_scan import encode_last_scan_kernel
from ._nodes import Nodes, accepted

# Fields of the bundle, in the order in which the kernels and the op's list have them.
SCAN_WEIGHTS = (
    "u_table", "taps", "conv_bias", "basis", "gain", "offset",
    "step_down", "step_up", "step_bias", "B_weight", "C_weight", "A", "D",
)  # fmt: skip
HEAD_WEIGHTS = (
    "z_table", "scan_norm_weight", "scan_norm_bias", "out_proj", "norm_weight", "norm_bias",
    "fc1", "fc1_bias", "fc2", "fc2_bias", "ffn_norm_weight", "ffn_norm_bias",
    "mix", "mix_bias", "text_table", "gate_weight", "gate_table",
)  # fmt: skip
WEIGHTS = (*SCAN_WEIGHTS, *HEAD_WEIGHTS, "last_weights")

# P of more columns does not fit in the registers of a program.
MAX_COLUMNS = 64
# One program has all channels of a row; float32 ones take twice the registers.
MAX_CHANNELS, MAX_CHANNELS_HALF, MAX_STATES = 128, 256, 64
COEFFICIENT_BYTES = 128 * 1024  # of shared memory, for the coefficients of all nodes
BLOCK_T = 16


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def launch_rows(
    item_ids: Tensor, lengths: Tensor, w: dict[str, Any], placement: str, stride: int, max_len: int
) -> Tensor:
    """u [B, ceil(L / stride), E] through memory, the last position first; places without a position are not written."""
    spectra, _, columns = w["basis"].shape
    (batch, seqlen), channels = item_ids.shape, w["u_table"].shape[1]
    dtype = w["u_table"].dtype
    arithmetic = Arithmetic.of(w["u_table"]).constexprs
    shared = {
        "PER_LENGTH": spectra > 1, "INNER": placement == "inner", "TAPS": len(w["taps"]), "BLOCK_R": MAX_COLUMNS,
        "ACC": arithmetic["ACC"], "PRECISION": arithmetic["PRECISION"],
    }  # fmt: skip
    p = torch.empty(batch, columns, channels, dtype=dtype, device=item_ids.device)
    block_e = min(_block(channels), 128)
    columns_kernel[(batch, columns // MAX_COLUMNS, triton.cdiv(channels, block_e))](
        item_ids, lengths, w["u_table"], w["taps"], w["conv_bias"], w["basis"], w["gain"], w["offset"], p,
        seqlen, max_len, columns, len(w["u_table"]), channels, *item_ids.stride(), **shared, DOT=arithmetic["DOT"],
        BLOCK_T=32, BLOCK_E=block_e, num_warps=8,
    )  # fmt: skip
    kept_slots = triton.cdiv(seqlen, stride)
    block_e = min(block_e, 64)  # an accumulator for each tap
    block_t, stages = (64, 2) if dtype.itemsize == 2 and placement == "inner" else (32, 1)
    u = torch.empty(batch, kept_slots, channels, dtype=dtype, device=item_ids.device)
    rows_kernel[(batch, triton.cdiv(kept_slots, block_t), triton.cdiv(channels, block_e))](
        lengths, p, w["taps"], w["conv_bias"], w["basis"], u, seqlen, max_len, kept_slots, stride, columns, channels,
        **shared, BLOCK_T=block_t, BLOCK_E=block_e, num_warps=8, num_stages=stages,
    )  # fmt: skip
    return u


def launch_scan(
    item_ids: Tensor, lengths: Tensor, w: dict[str, Any], u: Tensor | None, placement: str, stride: int, max_len: int,
    splits: int, rates: Tensor | None, coefficients: Tensor | None,
) -> Tensor:  # fmt: skip
    """The scan's output at the last position with D u, in parts: [splits, B, E], float32 at least."""
    (batch, seqlen), (dstate, channels) = item_ids.shape, w["A"].shape
    dtype = w["u_table"].dtype
    rank = w["step_up"].shape[0]
    spectra, columns = (1, 16) if w["basis"] is None else w["basis"].shape[::2]
    nodes = 0 if coefficients is None else len(coefficients)
    device, acc = item_ids.device, w["A"].dtype
    parts = torch.empty(splits, batch, channels, dtype=acc, device=device)
    scratch = torch.empty(0 if nodes else batch * splits * 2 * dstate * BLOCK_T, dtype=acc, device=device)
    block_r = columns if u is None else 16
    held = block_r if u is None and placement != "none" else 0
    p = torch.empty(batch, splits, held, channels, dtype=dtype, device=device)
    encode_last_scan_kernel[(batch, splits)](
        item_ids, lengths, u, *(w[name] for name in SCAN_WEIGHTS), rates, coefficients,
        parts, scratch, p, seqlen, max_len, triton.cdiv(seqlen, stride), stride, 0, len(w["u_table"]),
        channels, dstate, rank, *item_ids.stride(),
        SOURCE=placement if u is None else "given", PER_LENGTH=spectra > 1, TAPS=len(w["taps"]),
        SPLITS=splits, NODES=nodes, BLOCK_T=BLOCK_T, BLOCK_R=block_r,
        BLOCK_E=_block(channels), BLOCK_N=_block(dstate), BLOCK_RANK=_block(rank),
        **Arithmetic.of(w["u_table"]).constexprs, **_scan_options(dtype, nodes, placement, block_r, dstate, channels),
    )  # fmt: skip
    return parts


def _scan_options(
    dtype: torch.dtype, nodes: int, placement: str, block_r: int, dstate: int, channels: int
) -> dict[str, Any]:
    half = dtype.itemsize == 2
    roomy = block_r <= 32 and (half or placement == "inner")
    options: dict[str, Any] = {"num_stages": 1, "BLOCK_L": 32 if roomy else 16}
    # A node's coefficients take a warp's registers by the number of states.
    options["num_warps"] = 4 if nodes and dstate <= 16 else 8
    # Two programs on a multiprocessor; on 10.0 more than 16 states would spill for it, up to 68 bytes.
    if half and not nodes and channels <= 128:
        options["maxnreg"] = 255 if (target_arch() or 0) >= 100 else 128
    return options


def launch_gate(item_ids: Tensor, lengths: Tensor, w: dict[str, Any]) -> Tensor:
    """z [B, E] at the last position where it is filtered; float32 at least."""
    weights, z_table = w["last_weights"], w["z_table"]
    (batch, seqlen), channels = item_ids.shape, z_table.shape[1]
    z = torch.empty(batch, channels, dtype=weights.dtype, device=item_ids.device)
    block_e = min(_block(channels), 128)
    filtered_gate_kernel[(batch, triton.cdiv(channels, block_e))](
        item_ids, lengths, z_table, weights, z, seqlen, weights.shape[1], len(z_table), channels, *item_ids.stride(),
        BLOCK_T=32, BLOCK_E=block_e, ACC=triton_dtype(weights.dtype), num_warps=4,
    )  # fmt: skip
    return z


def launch_head(
    item_ids: Tensor, lengths: Tensor, parts: Tensor, z: Tensor | None, w: dict[str, Any], gate: str, residual: bool,
    eps: float,
) -> Tensor:  # fmt: skip
    """The query vectors [B, D]."""
    (batch, seqlen), (channels, dim) = item_ids.shape, w["out_proj"].shape
    hidden = w["fc1"].shape[1]
    dtype = w["u_table"].dtype
    query = torch.empty(batch, dim, dtype=dtype, device=item_ids.device)
    block_b, block_h = 16, 32 if dim <= 64 else 16
    encode_last_head_kernel[(triton.cdiv(batch, block_b),)](
        item_ids, lengths, parts, z, *(w[name] for name in HEAD_WEIGHTS),
        query, batch, seqlen, len(w["u_table"]), eps, dim, channels, hidden, *item_ids.stride(),
        SPLITS=len(parts), HAS_Z=z is not None, SCAN_NORM=w["scan_norm_weight"] is not None, GATE=gate,
        RESIDUAL=residual, BLOCK_B=block_b, BLOCK_D=_block(dim), BLOCK_E=_block(channels),
        BLOCK_H=min(_block(hidden), block_h), **Arithmetic.of(w["u_table"]).constexprs,
        num_warps=4 if dim <= 64 else 8, num_stages=1,
    )  # fmt: skip
    return query


@torch.library.custom_op("fastm2rec::encode_last", mutates_args=())
def _op(
    item_ids: Tensor,
    lengths: Tensor,
    weights: Sequence[Tensor | None],
    rates: Tensor | None,
    coefficients: Tensor | None,
    placement: str,
    stride: int,
    max_len: int,
    gate: str,
    residual: bool,
    eps: float,
    splits: int,
) -> Tensor:
    w: dict[str, Any] = dict(zip(WEIGHTS, weights, strict=True))
    u = z = None
    if not len(item_ids):
        return w["u_table"].new_empty(0, w["out_proj"].shape[1])
    if w["basis"] is not None and w["basis"].shape[2] > MAX_COLUMNS:
        u = launch_rows(item_ids, lengths, w, placement, stride, max_len)
    parts = launch_scan(
        item_ids, lengths, w, u, placement, stride, max_len, splits, rates, coefficients
    )  # fmt: skip
    if w["last_weights"] is not None:
        z = launch_gate(item_ids, lengths, w)
    return launch_head(item_ids, lengths, parts, z, w, gate, residual, eps)


@_op.register_fake
def _(
    item_ids, lengths, weights, rates, coefficients, placement, stride, max_len, gate, residual, eps, splits
):  # fmt: skip
    return weights[0].new_empty(item_ids.shape[0], weights[WEIGHTS.index("out_proj")].shape[1])


def _nodes(folded: Any) -> Nodes | None:
    """The nodes to compute with, None for exact exponentials."""
    nodes = accepted(folded.exponentials, folded.nodes)
    if nodes is None:
        return None
    count, dstate, channels = nodes.coefficients.shape
    if folded.u_table.dtype.itemsize > 2:
        lacks = f"half precision, got {folded.u_table.dtype}"
    elif count * _block(dstate) * _block(channels) * nodes.coefficients.element_size() > COEFFICIENT_BYTES:
        lacks = f"coefficients that fit on the chip, got {count} nodes of {dstate} states and {channels} channels"
    else:
        return nodes
    if folded.exponentials == "nodes":
        raise ValueError(f"exponentials: expected 'exact' or 'auto'; 'nodes' needs {lacks}")
    return None


def encode_last(item_ids: Tensor, lengths: Tensor, folded: Any) -> Tensor:
    """As `fastm2rec.reference.encode_last.encode_last`, with `folded.exponentials` in `folded.splits` parts of a row.

    An id that is out of range counts as padding, a length as the nearest one.

    Raises:
        ValueError: more channels or states than a program holds, or nodes asked for whose error is too large.
    """
    dstate, channels = folded.A.shape
    widest = MAX_CHANNELS_HALF if folded.u_table.dtype.itemsize == 2 else MAX_CHANNELS
    for name, size, most in (("d_inner", channels, widest), ("d_state", dstate, MAX_STATES)):
        if size > most:
            raise ValueError(
                f"{name}: expected at most {most} in these kernels with {folded.u_table.dtype}, got {size}; "
                "M2Rec.encode has no limit"
            )
    nodes = _nodes(folded)
    rates, coefficients = (None, None) if nodes is None else (nodes.rates, nodes.coefficients)
    return _op(
        item_ids, lengths, [getattr(folded, name) for name in WEIGHTS], rates, coefficients, folded.placement,
        folded.stride, folded.max_len, folded.gate, folded.residual, folded.eps, folded.splits,
    )  # fmt: skip
