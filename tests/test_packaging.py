"""The house: the layout that keeps editable installs, wheels, pytest and mypy working at once, and light imports."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Collection
from pathlib import Path

import pytest

import fastm2rec
from tests import _runs

LINKED = ("kernels", "reference")

# What is installed beside torch must not be needed; torch itself may import numpy and triton where they are.
BLOCKED = (
    "accelerate", "causal_conv1d", "cupy", "huggingface_hub", "jsonargparse", "mamba_ssm", "matplotlib", "numba",
    "pandas", "polars", "pooch", "safetensors", "sentence_transformers", "tensorboard", "tqdm", "triton",
)  # fmt: skip


def _python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders_stay_namespace_packages(root: Path, name: str) -> None:
    link = root / "fastm2rec" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}", "the link must be relative, or a clone elsewhere breaks"
    assert (root / name).is_dir()
    assert any((root / name).glob("*.py")), "a folder without files does not survive a clone"
    # `kernels` as a regular package in the root would shadow Hugging Face's package of that name.
    assert not (root / name / "__init__.py").exists()


def _python_without(packages: Collection[str], code: str) -> str:
    return _python(
        f"""
import sys
class Hide:  # what these finders find, less the packages that are to be absent
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in {packages!r}
        return None if hidden else self.finder.find_spec(name, path, target)
import torch
for name in {packages!r}:
    sys.modules.pop(name, None)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
{code}
"""
    )


def test_imports_with_torch_alone() -> None:
    code = """
import fastm2rec
for name in fastm2rec.__all__:
    getattr(fastm2rec, name)
config = fastm2rec.M2RecConfig(n_items=20, max_len=8, gate="none")
model = fastm2rec.M2Rec(config)
print(len(model.recommend([[1, 2, 3]], k=5)[0]))
"""
    assert _python_without(BLOCKED, code).strip() == "5"


def test_a_prepared_data_set_is_trained_on_without_polars(tmp_path: Path) -> None:
    _runs.inputs().dataset.save(tmp_path / "data")
    code = f"""
from fastm2rec.data import synthetic
from fastm2rec.training import RunConfig, train
config = RunConfig.from_dict({{
    "model": "m2rec", "gate": "none", "max_len": 6, "d_model": 8, "epochs": 1,
    "dataset": "prepared", "data": {str(tmp_path / "data")!r},
}})
print(train(config, {str(tmp_path / "run")!r}).epochs)
try:
    synthetic()
except ImportError as error:
    print(error.name, error)
"""
    trained, refused = _python_without(("polars", "pooch", "jsonargparse"), code).splitlines()[-2:]
    assert trained == "1"
    assert refused.startswith("polars reading a log needs polars, which is not installed: pip install")


@pytest.mark.parametrize("installed", [False, True])
def test_without_polars_a_test_file_is_skipped_from_pythonpath_alone(installed: bool) -> None:
    code = f"""
import importlib.metadata, sys
import pytest
sys.modules["polars"] = None  # its import raises ModuleNotFoundError
if not {installed}:
    importlib.metadata.distributions = lambda **_: []
code = pytest.main(["--collect-only", "-qrs", "-p", "no:cacheprovider", "tests/test_log.py", "tests/test_basis.py"])
print(int(code))
"""
    *said, code = _python(code).splitlines()
    assert ("SKIPPED [1] tests/conftest.py" in "\n".join(said)) is not installed
    assert (int(code) == pytest.ExitCode.OK) is not installed
    if not installed:
        assert any("polars is not installed" in line for line in said)


def test_import_loads_nothing_heavy() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import fastm2rec
print(" ".join(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    # No time is asserted: what takes long is what it would have to load.
    assert set(_python(code).split()) <= {"fastm2rec"} | set(sys.stdlib_module_names)


def test_every_public_name_exists() -> None:
    assert set(fastm2rec.__all__) <= set(dir(fastm2rec))
    for name in fastm2rec.__all__:
        assert getattr(fastm2rec, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'M3Rec'"):
        fastm2rec.M3Rec  # noqa: B018


def test_version_is_the_changelogs(root: Path) -> None:
    assert f"## {fastm2rec.__version__}" in (root / "CHANGELOG.md").read_text()


def test_dev_extra_brings_what_the_commands_need(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["dev"] == ["fastm2rec[triton,cpu,train,text,ann,serve,onnx,bench,tests]"]
    for heavy in ("mamba-ssm", "causal-conv1d", "cupy"):  # what needs nvcc, or a GPU
        for extra in ("triton", "cpu", "train", "text", "ann", "serve", "onnx", "bench", "tests"):
            assert not any(line.startswith(heavy) for line in project["optional-dependencies"][extra])


@pytest.mark.slow
def test_wheel_and_sdist_hold_real_files(root: Path, tmp_path: Path) -> None:
    """Built from a copy, as setuptools leaves its traces in the source folder."""
    copy = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_symlink():
            target.symlink_to(os.readlink(root / name))
        elif (root / name).exists():
            target.write_bytes((root / name).read_bytes())
    code = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (wheel,) = (copy / "dist").glob("*.whl")
    (sdist,) = (copy / "dist").glob("*.tar.gz")
    wheel_names = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    sdist_names = {member.name.partition("/")[2] for member in members if member.isfile()}
    for name in LINKED:
        for file in (root / name).glob("*.py"):
            assert f"fastm2rec/{name}/{file.name}" in wheel_names
            assert {f"fastm2rec/{name}/{file.name}", f"{name}/{file.name}"} & sdist_names
    assert "fastm2rec/py.typed" in wheel_names
    assert not any(name.startswith(("tests/", "bench/", "kernels/", "reference/")) for name in wheel_names)

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    output = _python(
        "import fastm2rec, fastm2rec.reference.selective_scan as s; print(fastm2rec.__file__, s.__file__)",
        PYTHONPATH=str(installed),
        PYTHONSAFEPATH="1",
    )
    assert output.count(str(installed)) == 2
