"""The kernels under pytest-benchmark, forward and training, each checked against its reference before it is timed.

    pytest tests/test_benchmarks.py --benchmark-only --benchmark-group-by=param:op

Without --benchmark-only or --benchmark-enable every case runs once and is checked, nothing is timed. Triton's kernels
run on a GPU only, as the interpreter's time says nothing. `bench/kernels.py` compares with other people's kernels.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from bench import _measure
from bench.peers._problem import PHASES, Peer, Problem, Shape

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (pip install 'fastm2rec[tests]')")

pytestmark = pytest.mark.benchmark

GPU = ["spectral_projection", "selective_scan", "last_state", "gated_fusion", "encode_last", "causal_conv1d"]
# Beside the CPU engine, which has kernels for these.
PLAIN = {
    "spectral_projection": "torch.fft",
    "last_scan": "reference",
    "filtered_last_scan": "reference",
    "cross_entropy": "torch",
    "embed_norm": "reference",
    "output_ffn": "reference",
    "causal_conv1d": "torch conv1d",
}
CASES = [
    *(pytest.param(op, "triton", id=f"{op}-triton", marks=pytest.mark.gpu) for op in GPU),
    *(pytest.param(op, impl, id=f"{op}-{impl}") for op in PLAIN for impl in ("cpu", PLAIN[op])),
]


def find(op: str, impl: str, phase: str) -> tuple[Shape, Problem, Peer]:
    """A problem of a size that its device is used for, and the peer that `impl` is."""
    device = torch.device("cuda" if impl == "triton" else "cpu")
    shape = Shape(op, phase, "bfloat16", 2048, 200) if impl == "triton" else Shape(op, phase, "float32", 8, 200)
    problem = importlib.import_module(f"bench.peers.{op}").problem(shape, device, False)
    peers = [peer for peer in problem.peers if peer.impl.startswith(impl) and peer.mode == "eager"]
    return shape, problem, peers[0]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("op", "impl"), CASES)
def test_kernel(op: str, impl: str, phase: str, benchmark: Any, pytestconfig: pytest.Config) -> None:
    shape, problem, peer = find(op, impl, phase)
    if peer.skipped is not None or (phase == "training" and not peer.trains):
        pytest.skip(peer.skipped or "has no gradient")
    dy = _measure.gradient(problem, shape)
    call = _measure.caller(peer, problem, shape, dy)
    error = _measure.error_of(call(0), list(_measure.reference_results(problem, shape, dy)))
    assert error <= _measure.TOLERANCE[shape.dtype] + peer.error

    def run() -> None:
        call(0)
        if impl == "triton":
            torch.cuda.synchronize()

    asked = pytestconfig.getoption("benchmark_only") or pytestconfig.getoption("benchmark_enable")
    benchmark.disabled = not asked
    benchmark.extra_info.update(vars(shape) | {"impl": impl})
    benchmark(run)
