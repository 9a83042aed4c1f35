"""What ops check of their tensors: shapes, dtypes, devices, and values where reading them is free."""

from __future__ import annotations

import torch
from torch import Tensor

from .._values import extremes, readable


def expect_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...], sizes: dict[str, int]) -> None:
    """Check `tensor` against a shape of numbers and letters; a letter's first use fixes its size."""
    fits = tensor.dim() == len(shape)
    for wanted, got in zip(shape, tensor.shape, strict=False):
        fits = fits and got == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, got))
    if not fits:
        expected = ", ".join(f"{s}={sizes[s]}" if isinstance(s, str) and s in sizes else str(s) for s in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")


def expect_alike(first: str, tensor: Tensor, others: dict[str, Tensor | None]) -> None:
    """Check that all tensors are real floating point on one device."""
    for name, other in {first: tensor, **others}.items():
        if other is None:
            continue
        if not other.is_floating_point():
            raise TypeError(f"{name}: expected a real floating-point tensor, got {other.dtype}")
        if other.device != tensor.device:
            raise ValueError(f"{name}: expected device {tensor.device}, that of {first}, got {other.device}")


def expect_lengths(lengths: Tensor, batch: int, seqlen: int, like: Tensor) -> None:
    """Check that there is an integer from 1 to `seqlen` for each row, on the device of `like`."""
    expect_row_integers(lengths, batch, like)
    if batch and readable(lengths):
        expect_length_values(lengths, seqlen)


def expect_row_integers(lengths: Tensor, batch: int, like: Tensor) -> None:
    """`expect_lengths` but for the values."""
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.shape != (batch,):
        raise ValueError(
            f"lengths: expected {batch} integers (shape [{batch}]), got {lengths.dtype} of shape {list(lengths.shape)}"
        )
    if lengths.device != like.device:
        raise ValueError(f"lengths: expected device {like.device}, got {lengths.device}")


def expect_length_values(lengths: Tensor, seqlen: int) -> None:
    """The values that `expect_lengths` reads."""
    low, high = extremes(lengths)
    if low < 1 or high > seqlen:
        raise ValueError(f"lengths: expected values from 1 to {seqlen}, got {low} to {high}")
