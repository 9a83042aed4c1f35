"""A process that trains in children of its own and kills them at a chosen moment: torch is imported once for all.

It reads requests from its standard input, one JSON object a line, and answers each with one:

    {"out": folder, "options": {...}, "resume": null, "moment": 17}   train and be killed at the 17th moment
    {"out": folder, "options": {...}, "resume": "last"}               train to the end
    {"out": folder, "options": {...}, "resume": null, "seen": file}   be killed by the parent once it sees the file

Moments are the steps of the optimiser and everything that changes a file: before a file is made, when half of it is
written, before it is flushed, linked, renamed or removed. Between two of them nothing on the disk changes.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from fastm2rec import storage
from fastm2rec.training import RunFolder
from tests import _runs


class Moments:
    """Counts what happens to a run, and kills this process at the chosen number."""

    def __init__(self, out: pathlib.Path, chosen: int | None) -> None:
        self.seen: list[str] = []
        self._place = out.parent
        self._chosen = chosen

    def pass_(self, name: str) -> None:
        if len(self.seen) == self._chosen:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append(name)

    def before(self, owner: Any, attribute: str) -> None:
        """Make every call of `owner.attribute` a moment, but for those with a path elsewhere: a compiler's cache."""
        call = getattr(owner, attribute)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            elsewhere = isinstance(args[0], str | os.PathLike) and not pathlib.Path(args[0]).is_relative_to(self._place)
            if not elsewhere:
                self.pass_(attribute)
            return call(*args, **kwargs)

        setattr(owner, attribute, wrapped)

    def halfway(self) -> None:
        """Make half-written files moments."""
        atomic_write, append = storage._atomic_write, RunFolder.append_metrics

        def torn_write(path: Any, write: Callable[[pathlib.Path], object]) -> None:
            def torn(temporary: pathlib.Path) -> None:
                write(temporary)
                whole = temporary.read_bytes()
                temporary.write_bytes(whole[: len(whole) // 2])
                self.pass_(f"half of {pathlib.Path(path).name}")
                temporary.write_bytes(whole)

            atomic_write(path, torn)

        def torn_append(folder: RunFolder, line: dict[str, Any]) -> None:
            path = folder.path / "metrics.jsonl"
            before = path.read_bytes()
            path.write_bytes(before + json.dumps(line).encode()[:30])
            self.pass_("half a line")
            path.write_bytes(before)
            append(folder, line)

        storage._atomic_write = torn_write
        RunFolder.append_metrics = torn_append  # type: ignore[assignment, method-assign]


def _child(request: dict[str, Any]) -> dict[str, Any]:
    # A killed process leaves what it wrote to the system: flushing, which is for power cuts, would only take time.
    os.fsync = lambda fd: None
    out = pathlib.Path(request["out"])
    moments = Moments(out, request.get("moment"))
    moments.halfway()
    for name in ("mkdir", "fsync", "link", "replace", "unlink", "open"):
        moments.before(os, name)
    moments.before(torch.optim.Adam, "step")
    try:
        result = _runs.run(out, resume=request.get("resume"), **request["options"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"steps": result.steps, "moments": moments.seen}


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, json.dumps(_child(request)).encode())
            os._exit(0)
        os.close(write)
        if "seen" in request:
            while not pathlib.Path(request["seen"]).exists():
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
        with os.fdopen(read, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"killed": True} if killed else json.loads(answer)), flush=True)


if __name__ == "__main__":
    _runs.inputs()
    torch.set_num_threads(1)
    # What a first step imports, imported once.
    import torch._dynamo
    import torch.utils.tensorboard

    _serve()
    os._exit(0)  # torch takes seconds to leave
