"""Files on disk: written whole or not at all, read without ever running code from them.

A file appears under its name only after its last byte is on the disk: it is written beside its destination, flushed,
and renamed. Whatever fails before that (a full disk, a kill, a wrong tensor) leaves an earlier file of that name alone.
Tensors travel as safetensors, everything else as JSON or text; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PathLike = str | os.PathLike[str]


class StorageError(RuntimeError):
    """A file could not be written, or what was read is not what its name promises."""


def _atomic_write(path: PathLike, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place of `path` in one step."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        os.close(handle)
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files that only their owner may read; a result is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        # safetensors reports a full disk as an error type of its own, so the message is what is carried on.
        raise StorageError(f"cannot write {path}: {error}; an earlier file of that name is untouched") from error
    except BaseException:  # Ctrl-C
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut. Not every file system can sync a folder; those that cannot say so."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def atomic_write_bytes(path: PathLike, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all.

    Raises:
        StorageError: nothing was written; an earlier file of that name is untouched.
    """
    _atomic_write(path, lambda temporary: temporary.write_bytes(data))


def atomic_write_text(path: PathLike, text: str) -> None:
    """`atomic_write_bytes` of `text` in UTF-8."""
    atomic_write_bytes(path, text.encode("utf-8"))


def write_json(path: PathLike, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: PathLike) -> Any:
    """The JSON value in `path`.

    Raises:
        StorageError: the file is absent, cannot be read or is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise StorageError(f"{path} is not valid JSON: {error}") from error


def save_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` (any device, any strides) to a safetensors file, whole or not at all.

    Args:
        path: the file; its folder is made if need be.
        tensors: name to tensor.
        metadata: strings kept in the file's header.

    Raises:
        StorageError: nothing was written; an earlier file of that name is untouched.
    """
    from safetensors.torch import save_file

    # A copy each: safetensors refuses views that share memory, and tied weights are a user's business, not a file's.
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        save_file(flat, temporary, dict(metadata) if metadata else None)
        _sort_metadata(temporary)

    _atomic_write(path, write)


def _sort_metadata(path: Path) -> None:
    """Equal content makes equal bytes: safetensors leaves the strings of the header in random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise ValueError(f"the header of a safetensors file has another form: {size} bytes, not {len(text)}")
        file.seek(8)
        file.write(text)


def load_tensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata of a safetensors file.

    Raises:
        StorageError: the file is absent, truncated or not a safetensors file; the message names it.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise StorageError(f"cannot read {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise StorageError(f"{path} ({size:,} bytes) is truncated or not a safetensors file: {error}") from error
