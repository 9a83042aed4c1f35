"""`encode_last`: what the kernel in `encode_kernels.py` needs around it."""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.encode_last import encode_last as reference
from . import symmetry
from .arrays import as_flat, scratch
from .last_scan import SLICE, last_scan, pack
from .last_scan import grain as scan_grain
from .threads import has_openmp, run, whole_lines

if TYPE_CHECKING:
    from ..folded import Folded

_lock = threading.Lock()
_packed: weakref.WeakKeyDictionary[Folded, Packed] = weakref.WeakKeyDictionary()


class Packed(NamedTuple):
    """A `Folded` as the kernel takes it, `arguments` being those that are the same in every call."""

    kernel: Any
    arguments: tuple[Any, ...]
    shape: Any
    scan: Any
    scratch: int
    dtype: torch.dtype


# Every tensor of a `Folded` with the channels of the scan, by the axis that they are on.
_CHANNELS_LAST = (
    "u_table", "z_table", "taps", "conv_bias", "step_up", "step_bias", "A", "D", "scan_norm_weight", "scan_norm_bias",
)  # fmt: skip
_CHANNELS_FIRST = ("step_down", "B_weight", "C_weight", "out_proj")
SAMPLE = 4096  # items whose step sizes tell how fast a channel forgets


def by_decay(folded: Folded) -> Folded:
    """The same model with its channels in the order of how slowly they forget.

    The kernels drop a state when a whole tile of channels has forgotten it: slow channels should share a tile.
    """
    dtype = torch.promote_types(folded.dtype, torch.float32)
    items = folded.u_table[1 : 1 + SAMPLE].to(dtype)
    u = F.silu(items * folded.taps.to(dtype).sum(0) + folded.conv_bias)
    step = F.softplus(u @ folded.step_down.to(dtype) @ folded.step_up.to(dtype) + folded.step_bias)
    order = (step.mean(0) * folded.A.abs().amin(0)).argsort(stable=True)
    tensors = folded.tensors()
    moved: dict[str, Any] = {name: tensors[name][..., order] for name in _CHANNELS_LAST if name in tensors}
    moved |= {name: tensors[name][order] for name in _CHANNELS_FIRST}
    return dataclasses.replace(folded, **moved)


def _pack_filter(folded: Folded, dtype: torch.dtype) -> tuple[Any, dict[str, int]]:
    """The `Filter` of `row_kernels.py`, and its sizes as `Shape` has them."""
    from . import parts, row_kernels

    if folded.basis is None:
        floats, integers = as_flat(None, dtype), as_flat(None, torch.int64)
        filter = row_kernels.Filter(floats, integers, integers, integers, floats, floats, floats)
        return filter, {"columns": 0, "orbits": 0, "slots": 0, "valid": 0}
    assert folded.gain is not None
    used = folded.basis.abs().amax((0, 1)).mul(folded.gain.abs().amax(0)).nonzero()
    columns = int(used[-1]) + 1 if len(used) else 1
    valid = len(folded.basis) > 1
    lengths = list(range(1, folded.max_len + 1)) if valid else [folded.max_len]
    packed = symmetry.pack(folded.basis[..., :columns].to(dtype), lengths, parts.ROWS)

    def gains(x: Tensor | None) -> Any:
        return as_flat(None if x is None else symmetry.reordered(x[:, :columns], packed.columns), dtype)

    filter = row_kernels.Filter(
        basis=as_flat(packed.basis, dtype),
        counts=as_flat(packed.counts, torch.int64),
        positions=as_flat(packed.positions, torch.int64),
        slots=as_flat(packed.slots, torch.int64),
        gain=gains(folded.gain),
        offset=gains(folded.offset),
        last=as_flat(folded.last_weights, dtype),
    )
    _, orbits, columns = packed.basis.shape
    return filter, {"columns": columns, "orbits": orbits, "slots": packed.positions.shape[1], "valid": int(valid)}


def _pack(folded: Folded) -> Packed:
    from . import encode_kernels as kernels
    from . import row_kernels
    from .simd import LANES

    dtype = torch.promote_types(folded.dtype, torch.float32)

    def rows(x: Tensor | None, parts: int = 1) -> Any:
        """[..., parts * n] to [..., parts, whole Lanes], flat; None to nothing."""
        if x is None:
            return as_flat(None, dtype)
        x = x.unflatten(-1, (parts, -1)) if parts > 1 else x
        return as_flat(F.pad(x, (0, -x.shape[-1] % LANES)), dtype)

    def norm(weight: Tensor | None, bias: Tensor | None) -> Any:
        return rows(None if weight is None or bias is None else torch.stack([weight, bias]))

    filter, sizes = _pack_filter(folded, dtype)
    gate = {"none": kernels.NONE, "linear": kernels.LINEAR, "constant": kernels.CONSTANT, "context": kernels.CONTEXT}
    placement = {"none": row_kernels.NONE, "inner": row_kernels.INNER, "input": row_kernels.INPUT}
    dim, dstate = folded.B_weight.shape
    shape = kernels.Shape(
        n_items=folded.n_items,
        max_len=folded.max_len,
        dim=dim,
        dstate=dstate,
        dt_rank=folded.step_down.shape[1],
        d_model=folded.out_proj.shape[1],
        hidden=folded.fc1.shape[1],
        width=len(folded.taps),
        **sizes,
        placement=placement[folded.placement],
        stride=folded.stride,
        gate=gate[folded.gate],
        residual=int(folded.residual),
        scan_norm=int(folded.scan_norm_weight is not None),
    )
    tables = kernels.Tables(
        rows(folded.u_table), rows(folded.z_table), rows(folded.text_table), rows(folded.gate_table, 2)
    )
    head = kernels.Head(
        taps=rows(folded.taps),
        conv_bias=rows(folded.conv_bias),
        scan_norm=norm(folded.scan_norm_weight, folded.scan_norm_bias),
        out_proj=rows(folded.out_proj),
        norm=norm(folded.norm_weight, folded.norm_bias),
        fc1=rows(folded.fc1),
        fc1_bias=rows(folded.fc1_bias),
        fc2=rows(folded.fc2),
        fc2_bias=rows(folded.fc2_bias),
        ffn_norm=norm(folded.ffn_norm_weight, folded.ffn_norm_bias),
        mix=rows(folded.mix),
        mix_bias=rows(folded.mix_bias),
        gate=rows(folded.gate_weight, 2),
    )
    projections = torch.cat([folded.step_down, folded.B_weight, folded.C_weight], dim=1).mT
    scan = pack(projections, folded.step_up.mT, folded.step_bias, folded.A.mT, folded.D, dtype)
    eps = torch.tensor(folded.eps, dtype=dtype).numpy()[()]  # of the kernel's dtype, so that it computes in that
    arguments = (shape, tables, filter, head, scan.weights, scan.transposed, eps)
    return Packed(kernels.encode, arguments, shape, scan, kernels.scratch_size(shape), dtype)


def _forget_lock() -> None:
    """A fork does not copy the thread that may hold it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)


def packed(folded: Folded) -> Packed:
    """The packed weights; they are made once and kept as long as `folded` is."""
    found = _packed.get(folded)
    if found is not None:
        return found
    with _lock:
        found = _packed.get(folded)
        if found is None:
            found = _packed[folded] = _pack(by_decay(folded))
        return found


def encode_last(item_ids: Tensor, lengths: Tensor, folded: Folded) -> Tensor:
    """As `fastm2rec.reference.encode_last.encode_last`, on the CPU; NaN for a row of unsound ids or length.

    In a compiled graph it is the reference, with the scan of `last_scan.py` in it, which such a graph can hold.
    """
    if torch.compiler.is_compiling():
        return reference(item_ids, lengths, folded, scan=last_scan)
    return _encode(item_ids, lengths, folded)[0]


def encode_checked(
    item_ids: Tensor, lengths: Tensor, folded: Folded, explain: Callable[[Tensor, Tensor, Folded], None]
) -> Tensor:
    """The same; if a row is not sound, the error that `explain` raises.

    The kernel reads all values anyhow: for one short row, checks before it would take as long as the rest.
    """
    out, sound = _encode(item_ids, lengths, folded)
    if not sound:
        explain(item_ids, lengths, folded)
    return out


encode_last.checked = encode_checked  # type: ignore[attr-defined] # what the op takes where it may raise


def _encode(item_ids: Tensor, lengths: Tensor, folded: Folded) -> tuple[Tensor, bool]:
    """The queries, and whether all rows are sound."""
    model = packed(folded)
    batch, seqlen = item_ids.shape
    out = torch.empty(batch, model.shape.d_model, dtype=model.dtype)
    unsound = np.zeros(1, np.int64)
    ids, ends, queries = as_flat(item_ids, torch.int64), as_flat(lengths, torch.int64), out.numpy().reshape(-1)
    arguments = (ids, ends, queries, unsound, seqlen, *model.arguments)
    if _shared(model, ends, seqlen):
        _encode_rows(model, arguments, seqlen)
    else:
        grain = scan_grain(model.scan, seqlen, model.shape.stride)
        run(model.kernel, arguments, batch, grain, model.scratch, model.dtype)
    return out if out.dtype == folded.dtype else out.to(folded.dtype), not unsound[0]


def _shared(model: Packed, lengths: np.ndarray, seqlen: int) -> bool:
    """Are there so few rows, all of them long, that threads should share each of them?"""
    from .simd import LANES

    tiles = -(-model.shape.dim // LANES)
    if not 0 < 2 * lengths.size <= min(torch.get_num_threads(), tiles) or not has_openmp():
        return False
    shortest = int(lengths.min()) * model.shape.dim * model.shape.dstate
    return shortest >= 2 * SLICE * model.shape.stride and int(lengths.max()) <= seqlen


def _encode_rows(model: Packed, arguments: tuple[Any, ...], seqlen: int) -> None:
    """Row after row, each by as many threads as there are."""
    from . import one_row_kernels as kernels

    threads, size = torch.get_num_threads(), whole_lines(kernels.scratch_size(model.shape))
    with (
        scratch(threads * size, model.dtype) as memory,
        scratch(kernels.row_size(model.shape, seqlen), model.dtype, "row") as row,
    ):
        kernels.encode_rows(np.zeros(9, np.int64), memory, size, threads, row, *arguments)
