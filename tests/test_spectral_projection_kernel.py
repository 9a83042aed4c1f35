"""The spectral projection's kernels against the reference in float64: both routes, every form, every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from fastm2rec.basis import row_basis
from fastm2rec.reference import spectral_projection as reference
from tests._bounds import assert_as_good, cast, gradients

pytest.importorskip("triton")
from fastm2rec.kernels._common import Arithmetic
from fastm2rec.kernels._spectral_fused import fits
from fastm2rec.kernels.spectral_fft import spectral_projection_fft
from fastm2rec.kernels.spectral_projection import (
    _backward_op,
    _forward_op,
    projects_columns,
    spectral_projection,
)

NAMES = ("x", "mask", "weight", "bias", "conv_weight", "conv_bias")
FORMS = ("filter", "linear", "input", "inner", "conv alone")


@dataclass(frozen=True)
class Case:
    """One call: B rows of L positions, R columns, C channels to O."""

    form: str
    L: int = 50
    R: int = 11
    C: int = 20
    O: int = 40  # noqa: E741
    mask: str = "R"
    width: int = 4
    activation: str | None = None
    biases: bool = True
    per_row: bool = False
    B: int = 2

    def __str__(self) -> str:
        return f"{self.form} {self.L}x{self.R} {self.mask}{' silu' if self.activation else ''}"

    def build(self, device: torch.device) -> tuple[Tensor, list[Tensor | None], Tensor]:
        """The basis, the leaves in the order of NAMES, and a gradient of the output; float64."""

        def r(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, device=device)

        conv = self.form in ("input", "inner", "conv alone")
        out = self.O if self.form in ("linear", "input", "inner") else self.C
        filtered = out if self.form == "inner" else self.C
        lengths = torch.tensor([self.L, max(1, self.L // 3)] if self.per_row else [self.L], device=device)
        basis = row_basis(lengths, self.L, self.R, "fourier", torch.float64)
        gains = {"none": None, "R": (self.R,), "BR": (self.B, self.R), "RC": (self.R, filtered)}[self.mask]
        linear = self.form not in ("filter", "conv alone")
        leaves = [
            r(self.B, self.L, self.C),
            None if gains is None else r(*gains).sigmoid(),
            r(out, self.C) / self.C**0.5 if linear else None,
            r(out) if linear and self.biases else None,
            r(out, self.width) / 2 if conv else None,
            r(out) if conv and self.biases else None,
        ]
        return basis if self.per_row else basis[0], leaves, r(self.B, self.L, out)

    def bound(self, function: Callable[..., Tensor], basis: Tensor) -> Callable[..., Tensor]:
        """`function` of the leaves alone."""

        def call(*leaves: Tensor | None) -> Tensor:
            x, mask, weight, bias, conv_weight, conv_bias = leaves
            return function(
                x, basis, mask, weight, bias, conv_weight=conv_weight, conv_bias=conv_bias,
                conv_first=self.form == "inner", activation=self.activation,
            )  # fmt: skip

        return call


def compared(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The output and all gradients, by name: the kernel's, plain PyTorch's and those in float64."""
    basis, leaves, dy = case.build(device)
    # As in the model under autocast: activations and weights in half precision, the basis and the mask in float32.
    wide = torch.promote_types(dtype, torch.float32)
    basis, leaves, dy = basis.to(wide), cast(leaves, dtype), dy.to(dtype)
    if leaves[1] is not None:
        leaves[1] = leaves[1].to(wide)
    got = gradients(case.bound(spectral_projection, basis), leaves, dy)
    plain = gradients(case.bound(reference.spectral_projection, basis), leaves, dy)
    double = case.bound(reference.spectral_projection, basis.double())
    exact = gradients(double, cast(leaves, torch.float64), dy)
    names = ["y", *(name for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None)]
    return dict(zip(names, zip(got, plain, exact, strict=True), strict=True))


def assert_as_good_as_pytorch(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    values = compared(case, dtype, device)
    if case.R <= 2 and "mask" in values:
        # One number or two, each a sum that may happen to be next to nothing: those of some draws together.
        draws = [values, *(compared(case, dtype, device) for _ in range(7))]
        ours, theirs, right = (torch.stack([draw["mask"][i] for draw in draws]) for i in range(3))
        values["mask"] = ours, theirs, right
    for name, (ours, theirs, right) in values.items():
        if name == "mask":  # float32 sums of products in `dtype`: rounded operands, so the band of `dtype`
            ours, theirs = ours.to(dtype), theirs.to(dtype)
        assert_as_good(ours, theirs, right, name=f"{case}: {name}")


WIDE: dict[str, Any] = {"L": 70, "R": 66}  # more columns than one kernel holds
CASES = [
    *(Case(form, activation="silu") for form in FORMS),
    *(Case("filter", mask=mask, per_row=mask == "BR") for mask in ("none", "BR")),
    *(Case(form, mask="RC", per_row=True) for form in FORMS[1:]),
    *(Case(form, **WIDE, C=36, O=20, activation="silu", mask="RC") for form in FORMS),
    *(Case(form, **WIDE, C=5, O=40, activation="silu", per_row=True, mask="BR") for form in ("linear", "input")),
    Case("inner", **WIDE, C=40, O=5, activation="silu"),
    *(Case(form, biases=False, width=width) for form in ("input", "inner") for width in (1, 3)),
    *(Case(form, L=length, R=min(length, 9)) for form in ("input", "inner") for length in (1, 2, 7, 63)),
    Case("linear", L=200, R=41, C=64, O=130, B=1),
    *(Case(form, L=201, R=41, C=32, activation="silu", B=1) for form in ("input", "inner")),
    Case("inner", L=7, R=5, C=130, O=70),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("nan_filled")
def test_as_good_as_pytorch(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    assert_as_good_as_pytorch(case, dtype, device)


def test_the_cases_take_every_route() -> None:
    half, single = Arithmetic(torch.float32, torch.bfloat16), Arithmetic(torch.float32, torch.float32)
    assert fits(41, 4, half)
    assert fits(41, 0, single)
    assert not fits(41, 4, single)
    assert not fits(65, 0, half)
    routes = {projects_columns(c.L, c.R, c.C, c.O, c.form == "inner") for c in CASES if c.form != "filter"}
    assert routes == {True, False}


@pytest.mark.parametrize(("seqlen", "most"), [(1000, 78), (100000, 85)])
def test_where_the_linear_goes(seqlen: int, most: int) -> None:
    """R < L D Dout / (D Dout + L Dout - L D), 64 to 256 channels."""
    assert projects_columns(seqlen, most, 64, 256, False)
    assert not projects_columns(seqlen, most + 1, 64, 256, False)
    assert projects_columns(seqlen, seqlen, 64, 256, True)  # the filter behind it would run on all 256


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_exact(form: str, device: torch.device) -> None:
    activation = None if form == "filter" else "silu"
    case = Case(form, L=6, R=3, C=2, O=3, width=3, mask="RC", activation=activation, per_row=True)
    basis, leaves, _ = case.build(device)
    inputs: Any = [None if leaf is None else leaf.requires_grad_() for leaf in leaves]
    assert gradcheck(case.bound(spectral_projection, basis), inputs, fast_mode=True)


ROUTES = [
    Case("input", activation="silu", B=3),
    Case("inner", activation="silu", B=3),
    Case("inner", **WIDE, C=5, O=6, activation="silu", B=3),
    Case("input", **WIDE, C=6, O=5, activation="silu", B=3),
]


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_a_row_has_the_same_bits_alone_and_twice(case: Case, device: torch.device) -> None:
    basis, leaves, dy = case.build(device)
    basis, leaves, dy = basis.bfloat16(), cast(leaves, torch.bfloat16), dy.bfloat16()
    call = case.bound(spectral_projection, basis)
    first, again = gradients(call, leaves, dy), gradients(call, leaves, dy)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    assert leaves[0] is not None
    y, dx, *_ = gradients(call, [leaves[0][1:2], *leaves[1:]], dy[1:2])
    assert torch.equal(y, first[0][1:2])
    assert torch.equal(dx, first[1][1:2])


@pytest.mark.parametrize("case", ROUTES[1:3], ids=str)
def test_any_strides(case: Case, device: torch.device) -> None:
    basis, leaves, dy = case.build(device)
    expected = gradients(case.bound(spectral_projection, basis), leaves, dy)

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1).mT.contiguous().mT[..., 0]

    assert not spread(leaves[0]).is_contiguous()  # type: ignore[arg-type]
    strided = [None if leaf is None else spread(leaf) for leaf in leaves]
    got = gradients(case.bound(spectral_projection, spread(basis)), strided, spread(dy))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_padding_of_short_rows_is_neither_read_nor_written(device: torch.device) -> None:
    lengths = torch.tensor([7, 20, 1], device=device)
    basis = row_basis(lengths, 20, 5, "fourier")
    x = torch.randn(3, 20, 4, device=device)
    y = spectral_projection(x, basis)
    for row, length in enumerate(lengths.tolist()):
        x[row, length:] = 1e9
        assert not y[row, length:].any()
    assert torch.equal(spectral_projection(x, basis), y)


@pytest.mark.parametrize("form", ["filter", "input", "inner"])
def test_the_custom_ops_keep_their_contract(form: str, device: torch.device) -> None:
    case = Case(form, L=20, R=5, C=4, O=6, activation="silu")
    basis, leaves, dy = case.build(device)
    x, *others = [None if leaf is None else leaf.float().requires_grad_() for leaf in leaves]
    flags = (form == "inner", True)
    arguments = (x, basis.float(), *others, *flags)
    torch.library.opcheck(_forward_op, (*arguments, True))
    assert x is not None
    s = _forward_op(*arguments, True)[1].detach()
    plain = [None if other is None else other.detach() for other in others]
    # No gradients of gradients: the backward op is checked for its schema and its shapes.
    torch.library.opcheck(
        _backward_op,
        (dy.float(), s, basis.float(), *plain, *flags, True),
        test_utils=("test_schema", "test_faketensor"),
    )


class Block(nn.Module):
    """The inner placement with its parameters, as a model has it; and the route by fast transforms."""

    basis: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 6), nn.Conv1d(6, 6, 4, groups=6)
        self.register_buffer("basis", row_basis(torch.tensor([20]), 20, 5, "fourier")[0])
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        y = spectral_projection(
            x, self.basis, self.gain, self.linear.weight, self.linear.bias,
            conv_weight=self.conv.weight.squeeze(1), conv_bias=self.conv.bias, conv_first=True, activation="silu",
        )  # fmt: skip
        return y + spectral_projection_fft(x, self.gain, self.linear.weight, self.linear.bias)


def test_compiled_and_exported(device: torch.device) -> None:
    block, x = Block().to(device), torch.randn(2, 20, 4, device=device)
    expected = block(x)
    expected.square().sum().backward()
    wanted = [parameter.grad for parameter in block.parameters()]
    block.zero_grad()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close([parameter.grad for parameter in block.parameters()], wanted)
    exported = torch.export.export(block, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("linear", "per_channel"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize(("seqlen", "bins"), [(1, 1), (50, 6), (201, 101)])
@pytest.mark.usefixtures("nan_filled")
def test_fast_transforms_are_as_good_as_pytorch(
    seqlen: int, bins: int, linear: bool, per_channel: bool, dtype: torch.dtype, device: torch.device
) -> None:
    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    leaves = [r(2, seqlen, 20), r(bins, 20) if per_channel else r(bins), *([r(40, 20), r(40)] if linear else [])]
    dy = r(2, seqlen, 40 if linear else 20)
    got = gradients(spectral_projection_fft, leaves, dy)
    plain = gradients(reference.spectral_projection_fft, leaves, dy)
    exact = gradients(reference.spectral_projection_fft, cast(leaves, torch.float64), dy)
    for name, ours, theirs, right in zip(["y", "x", "gain", "weight", "bias"], got, plain, exact, strict=False):
        assert_as_good(ours, theirs, right, name=name)


@pytest.mark.parametrize("linear", [False, True])
def test_fast_transforms_gradients_are_exact(linear: bool, device: torch.device) -> None:
    shapes = [(2, 6, 2), (3, 2), *([(3, 2), (3,)] if linear else [])]
    leaves = [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes]
    assert gradcheck(spectral_projection_fft, leaves, fast_mode=True)


@pytest.mark.parametrize("seqlen", [50, 51])
def test_both_routes_are_one_filter(seqlen: int, device: torch.device) -> None:
    x = torch.randn(2, seqlen, 5, dtype=torch.float64, device=device)
    weight = torch.randn(20, 5, dtype=torch.float64, device=device)
    basis = row_basis(torch.tensor([seqlen], device=device), seqlen, seqlen, "fourier", torch.float64)[0]
    gain = torch.rand(seqlen // 2 + 1, dtype=torch.float64, device=device)
    columns = gain[(torch.arange(seqlen, device=device) + 1) // 2]
    torch.testing.assert_close(
        spectral_projection_fft(x, gain, weight), spectral_projection(x, basis, columns, weight), rtol=0, atol=1e-12
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("seqlen", [50, 200, 201, 512, 1024])
@pytest.mark.parametrize("form", FORMS)
def test_on_a_device(form: str, seqlen: int, dtype: torch.dtype, device: torch.device) -> None:
    for columns in (2 * (seqlen // 10) + 1, seqlen):
        case = Case(form, L=seqlen, R=columns, C=64, O=256, activation="silu", B=33)
        assert_as_good_as_pytorch(case, dtype, device)


@pytest.mark.gpu
@pytest.mark.usefixtures("large_tensors")
def test_offsets_beyond_32_bits(device: torch.device) -> None:
    batch, seqlen, channels = 2**31 // (200 * 64) + 2, 200, 64
    basis = row_basis(torch.tensor([seqlen], device=device), seqlen, 41, "fourier")[0]
    x = torch.zeros(batch, seqlen, channels, dtype=torch.bfloat16, device=device)
    x[-1] = torch.randn(seqlen, channels, device=device)
    with torch.no_grad():
        y = spectral_projection(x, basis)
        assert torch.equal(y[-1:], spectral_projection(x[-1:], basis))
        assert not y[:-1].any()
        long = x.transpose(0, 1).contiguous().transpose(0, 1)  # a row's own positions lie far apart
        assert torch.equal(spectral_projection(long, basis)[-1:], y[-1:])
