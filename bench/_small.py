"""Small shapes of every kernel for the tools that slow a kernel down a thousand times; run as a script, one op of them.

    python bench/_small.py last_state

Odd sizes on purpose: masked lanes, a last tile that is not full.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":  # from a clone, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import _measure
from bench.peers._problem import PHASES, Shape

OPS = ("spectral_projection", "selective_scan", "last_state", "gated_fusion", "encode_last")
STATELESS = ("spectral_projection", "gated_fusion")
INFERENCE_ONLY = ("encode_last",)
BATCH, SEQ_LEN, D_STATE = 3, 67, 16
HOT_BATCH, HOT_SEQ_LEN = 256, 200  # enough to fill a GPU, for the counters


def shapes(op: str, hot: bool) -> list[Shape]:
    """Forward and backward, in both dtypes; one each where a tool looks at `hot` kernels."""
    batch, length = (HOT_BATCH, HOT_SEQ_LEN) if hot else (BATCH, SEQ_LEN)
    phases = PHASES[:1] if op in INFERENCE_ONLY else PHASES
    dtypes = ("bfloat16",) if hot else ("float32", "bfloat16")
    d_state = None if op in STATELESS else D_STATE
    return [Shape(op, phase, dtype, batch, length, d_state) for phase in phases for dtype in dtypes]


def run(op: str, device: torch.device, hot: bool = False) -> int:
    """Call every Triton peer of the op once; how many calls that were."""
    calls = 0
    for shape in shapes(op, hot):
        problem = importlib.import_module(f"bench.peers.{op}").problem(shape, device, False)
        dy = _measure.gradient(problem, shape)
        for peer in problem.peers:
            trains = shape.phase == "forward" or peer.trains
            if peer.impl.startswith("triton") and peer.run is not None and peer.mode == "eager" and trains:
                _measure.caller(peer, problem, shape, dy)(0)
                calls += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return calls


if __name__ == "__main__":
    print(run(sys.argv[1], torch.device("cuda"), hot="--hot" in sys.argv), "calls")
