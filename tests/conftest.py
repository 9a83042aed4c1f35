"""What every test shares: where the real data is, and the tests that this machine cannot run.

From PYTHONPATH, with nothing installed, a file whose imports are not all there is skipped, with the name of one that is
missing. Where the package is installed its extra `dev` has brought them, and a missing one is an error.

Without a CUDA device the kernels run in Triton's interpreter, which must be chosen before anything imports triton. With
FASTM2REC_TEST_ARCH=90 they are compiled for that architecture instead, and the emulator runs what comes out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
OURS = ("fastm2rec", "kernels", "bench", "reference", "tests")
INSTALLED = any(distribution.name == "fastm2rec" for distribution in importlib.metadata.distributions())
HAS_TRITON = importlib.util.find_spec("triton") is not None

ARCH = os.environ.get("FASTM2REC_TEST_ARCH")
if ARCH and ARCH not in ("80", "90"):
    raise pytest.UsageError(f"FASTM2REC_TEST_ARCH: expected 80 or 90, got {ARCH!r}")
if ARCH and torch.cuda.is_available():
    raise pytest.UsageError(
        "FASTM2REC_TEST_ARCH: the emulator stands in for a GPU; hide yours: CUDA_VISIBLE_DEVICES=''"
    )

if HAS_TRITON and not torch.cuda.is_available():
    assert "triton" not in sys.modules, "triton was imported before conftest could choose its interpreter"
    if ARCH:
        from fastm2rec import impl
        from tests import _emulator

        _emulator.activate(_emulator.Emulator(int(ARCH)))
        impl._IMPLEMENTATIONS["triton"] = replace(impl._IMPLEMENTATIONS["triton"], why_not=lambda device: None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        from tests import _interpreter  # noqa: F401  (repairs bfloat16)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if INSTALLED else _WithWhatIsThere.from_parent(parent, path=module_path)


class _WithWhatIsThere(pytest.Module):
    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            _ = self.obj  # imported here
        except self.CollectError as error:
            missing: BaseException | None = error.__cause__
            if isinstance(missing, ImportError) and missing.name and missing.name.partition(".")[0] not in OURS:
                pytest.skip(f"{missing.name} is not installed", allow_module_level=True)
            raise
        return super().collect()


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
def overlapping_writes() -> None:
    """For a test in which blocks write to one place: wrong input makes them, and the emulator refuses it."""
    if ARCH:
        pytest.skip("blocks write to one place")


@pytest.fixture
def large_tensors() -> Iterator[None]:
    """One test at a time, over all processes: tensors of more than 2^31 elements take a good part of a GPU's memory."""
    with FileLock(Path(tempfile.gettempdir()) / "fastm2rec-large-tensors.lock"):
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Memory from `torch.empty` and its kin holds NaN, so that a kernel that leaves a place unwritten is seen."""
    # On a GPU torch has no deterministic way of some operations, which would end the test; here all have one.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[Any]:
    """Sets the number of threads, for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
