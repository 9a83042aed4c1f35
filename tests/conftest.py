"""What every test shares: where the real data is, and the tests that this machine cannot run.

Without a CUDA device the kernels run in Triton's interpreter, which must be chosen before anything imports triton.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON and not torch.cuda.is_available():
    assert "triton" not in sys.modules, "triton was imported before conftest could choose its interpreter"
    os.environ["TRITON_INTERPRET"] = "1"
    from tests import _interpreter  # noqa: F401  (repairs bfloat16)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU if there is one, else the CPU, in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Memory from `torch.empty` and its kin holds NaN, so that a kernel that leaves a place unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real data sets, which are too big or too restricted to be part of the project."""
    folder = Path(os.environ.get("FASTM2REC_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent (set FASTM2REC_TEST_DATA)")
    return folder
