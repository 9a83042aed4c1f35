"""The symmetries of the bases, and the engine's products that use them, against plain products."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastm2rec import M2Rec, M2RecConfig, ops
from fastm2rec.basis import row_basis
from fastm2rec.cpu import symmetry
from fastm2rec.folded import Folded, fold
from tests._bounds import assert_as_good
from tests.test_folded import batch, build

LENGTHS = [1, 2, 3, 7, 50, 63, 200, 201]


def _expected_classes(n: int, kind: str) -> int:
    if kind == "dct":
        return 2 if n != 2 else 4  # of length two both bases are the same
    return 2 if n % 2 else 4


def _unfolded(found: symmetry.Orbits, n: int, columns: int) -> Tensor:
    """V again, by the definition of the classes' signs: column c has those of c modulo their number."""
    classes = found.positions.shape[1]
    signs = {
        1: ["+"],
        2: ["++", "+-"],
        4: ["++++", "+-+-", "+--+", "++--"],
    }[classes]
    basis = torch.full((n, columns), float("nan"), dtype=found.rows.dtype)
    for t, orbit in enumerate(found.positions.tolist()):
        for place, position in enumerate(orbit):
            if position < 0:
                continue
            for c, source in enumerate(found.source.tolist()):
                if source >= 0:
                    value = found.rows[t, c]
                    basis[position, source] = value if signs[c % classes][place] == "+" else -value
    return basis


@pytest.mark.parametrize("columns", [1, 4, 1000])
@pytest.mark.parametrize("kind", ["fourier", "dct"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 50, 63])
def test_orbits_hold_the_whole_basis(n: int, kind: Any, columns: int) -> None:
    columns = min(n, columns)
    basis = row_basis(torch.tensor([n]), n, columns, kind, torch.float64)[0]
    found = symmetry.orbits(basis)
    assert sorted(found.positions[found.positions >= 0].tolist()) == list(range(n))
    if columns > 1:  # a constant alone has every symmetry
        assert found.positions.shape[1] == _expected_classes(n, kind)
    # A turn and a square root have a few roundings, and so have those that the values are compared with.
    assert (_unfolded(found, n, columns) - basis).abs().max() <= 16 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [200, 201, 800, 1600])
def test_symmetries_survive_rounding(n: int, dtype: torch.dtype) -> None:
    """Where they were not seen, the products would be right, and slow."""
    for kind in ("fourier", "dct"):
        basis = row_basis(torch.tensor([n]), n, n // 5, kind, torch.float64)[0].to(dtype)
        basis = basis.to(torch.promote_types(dtype, torch.float32))
        assert symmetry.orbits(basis).positions.shape[1] == _expected_classes(n, kind), kind


def test_a_change_is_seen() -> None:
    basis = row_basis(torch.tensor([50]), 50, 11, "fourier", torch.float64)[0]
    assert symmetry.orbits(basis).positions.shape[1] == 4
    basis[7, 3] += 1e-12
    assert symmetry.orbits(basis).positions.shape[1] == 1


def test_tables_of_all_lengths_take_half_of_the_bases() -> None:
    for kind in ("fourier", "dct"):
        basis = row_basis(torch.arange(1, 65), 64, 16, kind)
        packed = symmetry.pack(basis, list(range(1, 65)), 8)
        assert packed.basis.shape == (64, 33, 24 if kind == "fourier" else 16)


def _check(folded: Folded, lengths: list[int]) -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    item_ids, n = batch(lengths, folded.max_len)
    with torch.no_grad():
        exact, got = (ops.encode_last(item_ids, n, folded, impl=impl) for impl in ("reference", "cpu"))
        # The same sums in another order; what the models here make of a rounding stays below a thousand of them.
        assert (got - exact).abs().max() <= 1e-13 * exact.abs().max()
        single = folded.to(dtype=torch.float32)
        plain, got = (ops.encode_last(item_ids, n, single, impl=impl) for impl in ("reference", "cpu"))
    # The folded offset of the convolution's bias is one rounding more than the specification has.
    assert_as_good(got, plain, exact, slack=4.0)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("spectrum", ["padded", "valid"])
@pytest.mark.parametrize("placement", ["inner", "input"])
@pytest.mark.parametrize("basis", ["fourier", "dct"])
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_encode_last_at_every_kind_of_length(seqlen: int, basis: str, placement: str, spectrum: str) -> None:
    model = build(
        max_len=seqlen, basis=basis, filter_placement=placement, spectrum=spectrum, theta=0.1, gate="none",
        mask="soft" if seqlen in (7, 50) else "hard", stride=5 if seqlen in (63, 200) else 1,
    )  # fmt: skip
    wanted = [seqlen, 1, seqlen // 5, seqlen // 4 + 1, seqlen // 2, seqlen // 2 + 1, 3 * seqlen // 4, seqlen - 1]
    _check(fold(model), [n for n in wanted if n > 0])


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("placement", ["inner", "input"])
def test_a_basis_without_symmetry(placement: str) -> None:
    folded = fold(build(max_len=31, filter_placement=placement, gate="none"))
    assert folded.basis is not None
    assert folded.gain is not None
    basis = torch.zeros_like(folded.basis)
    basis[0, :, :9] = torch.linalg.qr(torch.randn(31, 9, dtype=torch.float64))[0]
    gain = torch.rand_like(folded.gain)
    changes: dict[str, Any] = {"basis": basis, "gain": gain}
    if placement == "inner":
        changes["offset"] = gain * basis.sum(1)
    _check(dataclasses.replace(folded, **changes), [31, 1, 9, 30])


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("placement", ["inner", "input"])
def test_what_is_forgotten_is_not_expanded(placement: Any) -> None:
    """Step sizes so large that the scan ends after a few positions, in the middle of the orbits."""
    torch.manual_seed(0)
    model = M2Rec(M2RecConfig(n_items=30, max_len=400, gate="none", filter_placement=placement)).double().eval()
    with torch.no_grad():
        model.get_parameter("encoder.layers.0.mamba.dt_proj.bias").fill_(3.0)
    _check(fold(model), [400, 390, 210, 70])
