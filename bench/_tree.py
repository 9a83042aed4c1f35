"""The name that git gives to a folder's contents, with or without git: which kernels a row was measured with."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

IGNORED = {"__pycache__", ".mypy_cache", ".ruff_cache"}


def tree_hash(folder: Path) -> str:
    """What `git rev-parse HEAD:folder` says of a clean checkout, as 40 hexadecimal digits."""
    return _tree(folder).hex()


def _tree(folder: Path) -> bytes:
    entries = []
    for path in folder.iterdir():
        if path.name in IGNORED or path.suffix in (".pyc", ".partial"):
            continue
        if path.is_symlink():
            mode, name = b"120000", _object("blob", os.fsencode(os.readlink(path)))
        elif path.is_dir():
            mode, name = b"40000", _tree(path)
        else:
            mode = b"100755" if os.access(path, os.X_OK) else b"100644"
            name = _object("blob", path.read_bytes())
        # git sorts a folder as if its name ended in a slash
        key = os.fsencode(path.name) + (b"/" if mode == b"40000" else b"")
        entries.append((key, mode + b" " + os.fsencode(path.name) + b"\0" + name))
    return _object("tree", b"".join(entry for _, entry in sorted(entries)))


def _object(kind: str, content: bytes) -> bytes:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).digest()
