"""What the kernels share: nonlinearities that keep small values, what is computed in, and where kernels can run.

Exponentials are powers of two: exp(x) = exp2(x log2 e), one special-function instruction each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2, SQRT2 = tl.constexpr(0.6931471805599453), tl.constexpr(1.4142135623730951)


@triton.jit
def exp(x):
    """e^x."""
    return tl.exp2(x * LOG2E)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + exp(-x))


@triton.jit
def silu_grad(x):
    """d silu / dx = s (1 + x (1 - s)) with s = sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 <= e <= 1, accurate to the last digits: 1 + e would round away those of a small e."""
    if e.dtype == tl.float64:
        # The rounding of 1 + e cancels in the quotient (Kahan).
        rounded = 1.0 + e
        return tl.where(rounded == 1.0, e, tl.log2(rounded) * LN2 * (e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    # e times a minimax polynomial, relative error 3e-8; a third of the instructions of log2.
    p = 0.005232686176896095 * e - 0.029505206272006035
    p = p * e + 0.07822590321302414
    p = p * e - 0.13663241267204285
    p = p * e + 0.19106005132198334
    p = p * e - 0.2484298199415207
    p = p * e + 0.3331909775733948
    p = p * e - 0.4999949336051941
    return e * (p * e + 1.0)


@triton.jit
def softplus(x):
    """log(1 + e^x), accurate to the last digits also where e^x is small: mamba's log(1 + exp(x)) loses those."""
    return tl.maximum(x, 0.0) + _log1p(exp(-tl.abs(x)))


@triton.jit
def tf32_part(x):
    """float32 with the bits that TF32 drops set to zero; what is left of x fits in a second TF32 number."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def load_length(lengths_ptr, pid_b, seqlen, HAS_LENGTHS: tl.constexpr):
    """The row's length, kept within 1 to seqlen: on a GPU nobody has looked at the values."""
    length = seqlen
    if HAS_LENGTHS:
        # Cast last: of a length beyond 32 bits, the lower ones may look right.
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + pid_b).to(tl.int64), 1), seqlen).to(tl.int32)
    return length


@triton.jit
def load_ids(ids_ptr, offs, mask, table_rows):
    """Rows of a table, int64: 0, which is padding, where not in the mask and for an id outside of the table.

    One comparison, and one word to choose: to take the nearest row costs registers that `encode_last` does not have.
    """
    ids = tl.load(ids_ptr + offs, mask=mask, other=0).to(tl.int64)
    return tl.where(ids.to(tl.uint64) < table_rows.to(tl.uint64), ids.to(tl.int32), 0).to(tl.int64)


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32: nothing is ever accumulated in half precision."""
    doubles = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubles else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The same type in Triton's words, for constexpr arguments."""
    return {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[dtype]


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of dots whose operands are `dtype`: three TF32 products make up a float32 one."""
    return {torch.float32: "tf32x3", torch.float64: "ieee"}.get(dtype, "tf32")


@dataclass(frozen=True)
class Arithmetic:
    """What a call computes in: `acc` for sums and all else, `dot` for the operands of dots.

    That is float32, or float64 where an input is (in Triton's interpreter only, for gradient checks); values are cast
    at `tl.dot` operands and at stores.
    """

    acc: torch.dtype
    dot: torch.dtype

    @staticmethod
    def of(x: torch.Tensor, *others: torch.Tensor | None) -> Arithmetic:
        acc = compute_dtype(x, *others)
        half = x.dtype.itemsize == 2 and acc == torch.float32
        return Arithmetic(acc, x.dtype if half else acc)

    @property
    def constexprs(self) -> dict[str, object]:
        return {"ACC": triton_dtype(self.acc), "DOT": triton_dtype(self.dot), "PRECISION": dot_precision(self.dot)}


@triton.jit
def _probe():
    pass


def interpreting() -> bool:
    """Were the kernels made under TRITON_INTERPRET=1? Asks the kernels, not the environment, which may have changed."""
    return type(_probe).__name__ == "InterpretedFunction"


def target_arch() -> int | None:
    """The compute capability that kernels are compiled for, 90 for 9.0; None in the interpreter. For launchers only."""
    return None if interpreting() else triton.runtime.driver.active.get_current_target().arch
