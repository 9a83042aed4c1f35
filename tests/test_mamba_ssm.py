"""mamba-ssm as an implementation: a stand-in with the contract of its CUDA extension shows that it is called rightly.

The stand-in computes with the reference and refuses what the extension would refuse. Where there is a GPU and both
packages are installed, the real ones run.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from fastm2rec import ImplementationError, _mamba_ssm, impl, ops
from fastm2rec.reference import last_state as reference_last
from fastm2rec.reference import selective_scan as reference_scan
from fastm2rec.reference.causal_conv1d import causal_conv1d
from tests._bounds import gradients

# Their results are a tensor or a pair, and their arguments come as lists: too much for a type checker to follow.
selective_scan: Any = reference_scan.selective_scan
last_state: Any = reference_last.last_state
their_scan: Any = _mamba_ssm.selective_scan
their_last: Any = _mamba_ssm.last_state


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *vectors: Tensor | None) -> None:
    assert all(tensor.stride(-1) == 1 for tensor in (u, delta, B, C))
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert A.dtype == torch.float32
    assert B.dim() == C.dim() == 4
    assert B.shape[1] == C.shape[1] == 1
    assert all(vector is None or (vector.dtype == torch.float32 and vector.stride(-1) == 1) for vector in vectors)


def _fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    _check(u, delta, A, B, C, D, delta_bias)
    scan = (u, delta, A, B.squeeze(1), C.squeeze(1), D)
    out, state = selective_scan(*scan, None, delta_bias, delta_softplus, True)
    x = torch.zeros(*u.shape[:2], 1, 2 * A.shape[1])
    x[:, :, 0, 1::2] = state
    gated = [] if z is None else [selective_scan(*scan, z, delta_bias, delta_softplus)]
    return [out, x, *gated]


def _bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute):
    _check(u, delta, A, B, C, D, delta_bias)
    assert dout.stride(-1) == 1
    assert (out is None) == (z is None)
    tensors = [t if t is None else t.detach().requires_grad_() for t in (u, delta, A, B, C, D, z, delta_bias)]
    with torch.enable_grad():
        u, delta, A, B, C, D, z, delta_bias = tensors
        y = selective_scan(u, delta, A, B.squeeze(1), C.squeeze(1), D, z, delta_bias, delta_softplus)
    wanted = [u, delta, A, B, C, D, delta_bias, *([] if z is None else [z])]
    given = iter(torch.autograd.grad(y, [tensor for tensor in wanted if tensor is not None], dout))
    return [None if tensor is None else next(given) for tensor in wanted]


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins: dict[str, dict[str, Any]] = {
        "selective_scan_cuda": {"fwd": _fwd, "bwd": _bwd},
        "causal_conv1d": {
            "causal_conv1d_fn": lambda x, weight, bias, activation=None: causal_conv1d(x, weight, bias, activation)
        },
    }
    for name, functions in stand_ins.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for function, value in functions.items():
            setattr(module, function, value)
        monkeypatch.setitem(sys.modules, name, module)


def _inputs(dtype: torch.dtype = torch.float32) -> list[Any]:
    B, E, N, L = 2, 6, 3, 11
    u, delta = (torch.randn(B, L, E, dtype=dtype).transpose(1, 2) for _ in range(2))
    states = [torch.randn(B, L, N, dtype=dtype).transpose(1, 2) for _ in range(2)]
    return [u, delta, -torch.rand(E, N).exp(), *states, torch.randn(E), torch.randn(B, E, L), torch.randn(E)]


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_scan(without: tuple[str, ...]) -> None:
    inputs = [
        None if name in without else tensor
        for name, tensor in zip(("u", "delta", "A", "B", "C", "D", "z", "delta_bias"), _inputs(), strict=True)
    ]
    dy = torch.randn(2, 6, 11).transpose(0, 1).contiguous().transpose(0, 1)
    got = gradients(lambda *args: their_scan(*args, delta_softplus=True), inputs, dy)
    expected = gradients(lambda *args: selective_scan(*args, delta_softplus=True), inputs, dy)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    _, state = their_scan(*inputs, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(state, selective_scan(*inputs, delta_softplus=True, return_last_state=True)[1])


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("lengths", [None, torch.tensor([11, 4])])
def test_last_position(lengths: Tensor | None) -> None:
    u, delta, A, B, C, D, z, bias = _inputs()
    inputs = [u, delta, A, B, C[:, :, 3], D, z[:, :, 5], bias]
    dy = torch.randn(2, 6)
    got = gradients(lambda *args: their_last(*args, True, lengths), inputs, dy)
    expected = gradients(lambda *args: last_state(*args, True, lengths), inputs, dy)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("extension")
def test_convolution() -> None:
    x, weight, bias = torch.randn(2, 6, 11), torch.randn(6, 4), torch.randn(6)
    expected = causal_conv1d(x, weight, bias, "silu")
    assert torch.equal(_mamba_ssm.causal_conv1d(x, weight, bias, "silu"), expected)


def test_what_it_cannot_do_is_an_error() -> None:
    u, delta, A, B, C, *_ = _inputs()
    with pytest.raises(ImplementationError, match="takes no initial_state; impl='triton' does"):
        their_scan(u, delta, A, B, C, initial_state=torch.zeros(2, 6, 3))
    with pytest.raises(ImplementationError, match="takes no cu_seqlens"):
        their_scan(u, delta, A, B, C, cu_seqlens=torch.tensor([0, 11]))
    with pytest.raises(ImplementationError, match="got exponentials='nodes' and splits=1"):
        their_last(u, delta, A, B, C[:, :, 0], exponentials="nodes")
    with pytest.raises(ImplementationError, match="got float64"):
        their_scan(u.double(), delta, A, B, C)
    with pytest.raises(ImplementationError, match="on cpu: mamba-ssm's scan runs on CUDA devices only"):
        ops.selective_scan(u, delta, A, B, C, impl="mamba_ssm")


def test_what_is_missing_is_named() -> None:
    if importlib.util.find_spec("selective_scan_cuda") is not None:
        pytest.skip("mamba-ssm is installed")
    assert _mamba_ssm.missing() == (
        "mamba-ssm and causal-conv1d not installed (pip install 'fastm2rec[mamba]'; building them needs nvcc)"
    )


def test_triton_on_a_cpu_is_for_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = impl.unavailable("last_state", "triton", "cpu")
    assert reason is not None
    assert "run on CUDA devices" in reason or "triton is not installed" in reason
    assert impl.chosen("last_state", "auto", "cpu") in ("cpu", "reference")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_extension(dtype: torch.dtype, device: torch.device) -> None:
    if _mamba_ssm.missing():
        pytest.skip(str(_mamba_ssm.missing()))
    inputs = [tensor.to(device) for tensor in _inputs(dtype)]
    dy = torch.randn(2, 6, 11, device=device)
    got = gradients(lambda *args: their_scan(*args, delta_softplus=True), inputs, dy)
    expected = gradients(lambda *args: selective_scan(*args, delta_softplus=True), inputs, dy)
    # mamba-ssm's own test tolerances for its CUDA scan.
    rtol, atol = (6e-4, 2e-3) if dtype == torch.float32 else (3e-2, 5e-2)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol * float(b.abs().max().clamp(min=1)))
