"""Rows, where they come from, and the ways to look at them: a table, a JSON file, ratios."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench._tree import tree_hash

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
EVERYTHING = "all"  # the impl and mode of a row that stands for all rows of a model at a shape that was not measured


@dataclass
class Row:
    """One measurement. Times are milliseconds per batch; a row that could not run has `skipped` and no times.

    `phase` is "inference" or "training". `positions` says where a training step's loss is: at the "last" position, at
    "all" of them, or at the "masked" ones; it is None for inference. `cpu_ms` is the processor time of all threads.
    `peak_mem_mb` counts what a call holds on top of `state_mb`: weights, and in training gradients and moments.
    """

    model: str
    impl: str
    mode: str
    dtype: str
    batch: int
    seq_len: int
    d_state: int | None
    n_items: int
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    sequences_per_s: float | None = None
    peak_mem_mb: float | None = None
    bound: str | None = None
    bound_ms: float | None = None
    bound_share: float | None = None
    max_rel_err: float | None = None
    skipped: str | None = None
    script: str | None = None
    phase: str = "inference"
    positions: str | None = None
    threads: int | None = None
    cpu_ms: float | None = None
    state_mb: float | None = None


def row_label(row: Row | Mapping[str, Any]) -> str:
    """What tells a row from the others of its script, in one word of a command line."""
    values = row if isinstance(row, Mapping) else asdict(row)
    names = ("model", "impl", "mode", "phase", "positions", "dtype", "batch", "seq_len", "n_items")
    return "/".join(str(values.get(name)) for name in names)


def device_name(device: torch.device) -> str:
    """The device as people call it.

    A CPU with matrix units (AMX), which help bfloat16 most, says so, and so does one of x86 without AVX-512: one name
    may stand for processors of several generations.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
    except (OSError, StopIteration):
        model, flags = platform.processor() or platform.machine(), []
    if "avx2" in flags and "avx512f" not in flags:
        model += " without AVX-512"
    return f"{model}, {'AMX, ' if 'amx_bf16' in flags else ''}{torch.get_num_threads()} threads"


def record_folder(name: str, kind: str) -> Path:
    """Where the records of a device are kept, by its `device_name` and its type."""
    folder = name.partition(",")[0].lower().replace(" ", "-").replace("(r)", "")
    return ROOT / "bench" / "results" / (f"cpu-{folder}" if kind == "cpu" else folder)


def document(device: torch.device, rows: Sequence[Row], source: dict[str, Any] | None = None) -> dict[str, Any]:
    """Rows with everything that is needed to know what they mean; `source` is `origin` of when they were made."""
    where = {"device": device_name(device), "device_type": device.type}
    return {"schema": SCHEMA, **where, **(source or origin()), "rows": [asdict(row) for row in rows]}


def origin() -> dict[str, Any]:
    """The code and the libraries that rows come from, and when."""
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "kernels_tree": tree_hash(ROOT / "kernels")[:12],  # as they are on the disk
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def result_path(script: str, device: torch.device, out: str | None, record: bool) -> Path:
    """Where a run's JSON goes: where it was asked to, to bench/results with --record, else to a temporary folder."""
    if out is not None:
        return Path(out)
    name = f"{script}.json"
    if record:
        return record_folder(device_name(device), device.type) / name
    return Path(tempfile.mkdtemp(prefix="fastm2rec-bench-")) / name


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write the document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


class Writer:
    """A result file that is whole after every row: a run that is killed has lost nothing but the row it was at."""

    def __init__(self, path: Path, device: torch.device, script: str) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._device = device
        self._script = script
        self._threads = torch.get_num_threads() if device.type == "cpu" else None
        self._origin = origin()  # as the run began: what is edited meanwhile has not run

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows and write the file."""
        for row in rows:
            row.script, row.threads = self._script, self._threads
            self.rows.append(row)
        self._write(self.rows)

    def preview(self, rows: Sequence[Row]) -> None:
        """Write the file with `rows` behind those it has; the next ones take their place."""
        self._write([*self.rows, *(replace(row, script=self._script, threads=self._threads) for row in rows)])

    def _write(self, rows: Sequence[Row]) -> None:
        write_json(self.path, document(self._device, rows, self._origin))


def aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """A header and rows of cells as lines of text; columns in `left` are aligned there, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return text


def fastest_sasrec(rows: Sequence[Row], row: Row) -> Row | None:
    """The fastest SASRec of the same shape and phase, whatever its dtype; None if none was timed."""
    shape = shape_of(row)
    peers = [other for other in rows if other.model == "sasrec" and other.median_ms and shape_of(other) == shape]
    return min(peers, key=lambda other: other.median_ms or 0, default=None)


def best_peer(rows: Sequence[Row], row: Row) -> float | None:
    """The time of `fastest_sasrec`, in milliseconds."""
    peer = fastest_sasrec(rows, row)
    return None if peer is None else peer.median_ms


def shape_of(row: Row) -> tuple[object, ...]:
    """What two rows must share to be compared."""
    return row.phase, row.batch, row.seq_len, row.n_items
