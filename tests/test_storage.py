"""Files are written whole or not at all, and what is not a whole file is refused by name."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastm2rec import StorageError
from fastm2rec.storage import atomic_write_text, load_tensors, read_json, save_tensors, write_json


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_survive_with_dtype_strides_and_sharing(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {"t": base.t(), "same": base, "half": base.bfloat16(), "n": torch.tensor(3), "empty": torch.empty(0, 2)}
    save_tensors(tmp_path / "new" / "x.safetensors", tensors, {"note": "é"})
    loaded, metadata = load_tensors(tmp_path / "new" / "x.safetensors")
    assert metadata == {"note": "é"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_no_traces_and_ordinary_permissions(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        atomic_write_text(tmp_path / "a.txt", "one")
        atomic_write_text(tmp_path / "a.txt", "two")
    finally:
        os.umask(old)
    assert (tmp_path / "a.txt").read_text() == "two"
    assert _files(tmp_path) == ["a.txt"]
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"w": torch.ones(3)})
    # More than the limit on a file's size, which is how a test can have no disk space.
    code = f"""
import resource, signal, torch
from fastm2rec.storage import StorageError, save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    save_tensors({str(path)!r}, {{"w": torch.zeros(1 << 20)}})
except StorageError as error:
    print(error)
"""
    assert hasattr(resource, "RLIMIT_FSIZE")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "cannot write" in run.stdout, run.stderr
    assert str(path) in run.stdout
    assert _files(tmp_path) == ["x.safetensors"]
    assert torch.equal(load_tensors(path)[0]["w"], torch.ones(3))


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write .*file/x.json"):
        write_json(tmp_path / "file" / "x.json", {})


@pytest.mark.parametrize("keep", [0, 4, 40, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"w": torch.ones(100)})
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if isinstance(keep, int) else keep * len(data))])
    with pytest.raises(StorageError, match=r"x.safetensors \(\d+ bytes\) is truncated or not a safetensors file"):
        load_tensors(path)


def test_absent_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no.safetensors: no such file"):
        load_tensors(tmp_path / "no.safetensors")
    with pytest.raises(StorageError, match=r"cannot read .*no.json: No such file"):
        read_json(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(StorageError, match="bad.json is not valid JSON"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(StorageError, match="bad.json is not valid JSON"):
        read_json(tmp_path / "bad.json")
