"""How wrong a kernel may be: no worse than plain PyTorch in the same dtype, against the same computation in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Sums in another order lose other roundings than the reference's: as many, not the same. A band of a few units in the
# last place of the largest value keeps cases in which plain PyTorch happens to be exact from failing.
SLACK, BAND = 2.0, 4.0


def assert_as_good(got: Tensor, plain: Tensor, exact: Tensor, slack: float = SLACK, name: str = "output") -> None:
    """Check max|got - exact| <= slack * max|plain - exact| + a few roundings of max|exact|.

    Args:
        got: what the kernel computed.
        plain: the reference in the kernel's dtype, on the same inputs.
        exact: the reference in float64, on the same inputs.
        slack: factor on plain's error.
        name: for the message.
    """
    _assert_comparable(got, plain, name)
    if not got.numel():
        return
    exact = exact.double()
    error = float((got.double() - exact).abs().max())
    lost = float((plain.double() - exact).abs().max())
    bound = slack * lost + BAND * torch.finfo(got.dtype).eps * float(exact.abs().max())
    assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e} (plain {got.dtype} loses {lost:.3e})"


def assert_as_good_on_average(
    draws: Sequence[tuple[Tensor, Tensor, Tensor]], slack: float = SLACK, name: str = "output"
) -> None:
    """`assert_as_good` of the root mean square over `draws` of (got, plain, exact), each relative to its max|exact|.

    For what is a product of many factors: in a draw of its own plain PyTorch may happen to lose a fifth of what it
    loses as a rule, and a kernel thrice that.
    """
    squares = [0.0, 0.0]
    for got, plain, exact in draws:
        _assert_comparable(got, plain, name)
        largest = float(exact.abs().max())
        for i, values in enumerate((got, plain)):
            squares[i] += (float((values.double() - exact).abs().max()) / largest) ** 2
    error, lost = ((square / len(draws)) ** 0.5 for square in squares)
    bound = slack * lost + BAND * torch.finfo(got.dtype).eps
    assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e} (plain {got.dtype} loses {lost:.3e})"


def assert_same(got: Tensor, expected: Tensor, name: str = "output") -> None:
    """The same values from another specialisation of a kernel, for other strides or without what a gradient needs.

    Bit-equal in Triton's interpreter. A compiler fuses other products with sums in each: there, within a few roundings.
    """
    from fastm2rec.kernels._common import interpreting

    if interpreting():
        assert torch.equal(got, expected), name
    else:
        assert_as_good(got, expected, expected.double(), name=name)


def _assert_comparable(got: Tensor, plain: Tensor, name: str) -> None:
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, expected {plain.dtype}"
    assert got.shape == plain.shape, f"{name}: shape {list(got.shape)}, expected {list(plain.shape)}"
    assert got.isfinite().all(), f"{name}: not finite"


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor) -> list[Tensor]:
    """The output of `function(*inputs)` and its gradients for every floating-point input, given that of the output."""
    leaves = [
        tensor.detach().requires_grad_() if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in inputs
    ]
    y = function(*leaves)
    wanted = [tensor for tensor in leaves if tensor is not None and tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


def cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Floating-point tensors in `dtype`, strides kept; integers as they are."""
    return [
        tensor
        if tensor is None or not tensor.is_floating_point()
        else tensor.to(dtype, memory_format=torch.preserve_format)
        for tensor in tensors
    ]
