"""Products with a basis by its orbits, and their gradients, against plain products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastm2rec.basis import row_basis
from tests._bounds import assert_as_good

pytest.importorskip("numba", reason="numba is not installed")

from fastm2rec.cpu import products

pytestmark = pytest.mark.usefixtures("way")

LENGTHS = [1, 2, 3, 4, 7, 50, 63, 64, 200, 201]


@pytest.fixture(params=["orbits", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every basis by its orbits, and as it is."""
    monkeypatch.setattr(products, "LEAST", {"orbits": 0, "plain": 10**9}[request.param])


def _basis(seqlen: int, kind: Any, columns: int) -> Tensor:
    if kind == "none":
        return torch.randn(seqlen, columns, dtype=torch.float64)
    return row_basis(torch.tensor([seqlen]), seqlen, columns, kind, torch.float64)[0]


def _with_ends(basis: Tensor, extra: int) -> Tensor:
    return torch.cat([basis, torch.eye(len(basis), dtype=basis.dtype)[:, len(basis) - extra :]], dim=1)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("kind", ["fourier", "dct", "none"])
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_values_and_gradients(seqlen: int, kind: str) -> None:
    for columns, channels in ((max(1, seqlen // 5), 64), (seqlen, 5)):
        extra = min(3, seqlen)
        basis = _basis(seqlen, kind, columns)
        bases = _with_ends(basis, extra)
        x = torch.randn(4, seqlen, channels, dtype=torch.float64)
        dbins = torch.randn(4, columns + extra, channels, dtype=torch.float64)
        bins, dx = torch.randn(4, columns, channels, dtype=torch.float64), torch.randn_like(x)
        exact = [bases.mT @ x, bases @ dbins, basis @ bins, basis.mT @ dx]
        found = _products([x, dbins, bins, dx], basis, extra)
        single, low, low_bases = [tensor.float() for tensor in (x, dbins, bins, dx)], basis.float(), bases.float()
        plain = [low_bases.mT @ single[0], low_bases @ single[1], low @ single[2], low.mT @ single[3]]
        for a, b, c, d in zip(_products(single, low, extra), plain, exact, found, strict=True):
            torch.testing.assert_close(d, c, rtol=1e-12, atol=1e-12)
            assert_as_good(a, b, c)


def _products(tensors: list[Tensor], basis: Tensor, extra: int) -> list[Tensor]:
    """V^T x with its last positions, and the gradient of x; V bins, and the gradient of bins."""
    packed = products.pack(basis, basis.dtype)
    x, dbins, bins, dx = (tensor.clone().requires_grad_() for tensor in tensors)
    first, second = products.contract(x, basis, packed, extra), products.expand(bins, basis, packed)
    found = [first, *torch.autograd.grad(first, x, dbins), second, *torch.autograd.grad(second, bins, dx)]
    return [tensor.detach() for tensor in found]


def test_custom_ops() -> None:
    basis = _basis(9, "fourier", 5).float()
    packed = products.pack(basis, torch.float32)
    rest = (basis, *packed[:3], packed[3:], 3)
    torch.library.opcheck(products._contract_op, (torch.randn(2, 9, 32, requires_grad=True), *rest))
    torch.library.opcheck(products._expand_op, (torch.randn(2, 8, 32, requires_grad=True), *rest))


def test_rows_do_not_depend_on_their_batch_nor_on_threads(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    basis = _basis(50, "fourier", 11).float()
    packed = products.pack(basis, torch.float32)
    x = torch.randn(9, 50, 64)
    whole = products.contract(x, basis, packed, 3)
    assert torch.equal(products.contract(x[4:5], basis, packed, 3)[0], whole[4])
    monkeypatch.setattr(products, "MULTIPLY_ADDS", 1)
    threads(3)
    assert torch.equal(products.contract(x, basis, packed, 3), whole)
    bins = products.expand(whole[:, :11], basis, packed)
    threads(1)
    assert torch.equal(bins, products.expand(whole[:, :11], basis, packed))


def test_empty_batch() -> None:
    basis = _basis(50, "fourier", 11).float()
    packed = products.pack(basis, torch.float32)
    assert products.contract(torch.empty(0, 50, 64), basis, packed, 3).shape == (0, 14, 64)
