"""Rows, where they come from, and the three ways to look at them: a table, a JSON file, ratios."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1


@dataclass
class Row:
    """One measurement. Times are milliseconds per batch; a row that could not run has `skipped` and no times."""

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


def device_name(device: torch.device) -> str:
    """The device as people call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def document(device: torch.device, rows: Sequence[Row]) -> dict[str, Any]:
    """Rows with everything that is needed to know what they mean."""
    where = {"device": device_name(device), "device_type": device.type}
    return {"schema": SCHEMA, **where, **origin(), "rows": [asdict(row) for row in rows]}


def origin() -> dict[str, Any]:
    """The code and the libraries that rows come from, and when."""
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "kernels_tree": (_git("rev-parse", "HEAD:kernels") or "")[:12] or None,
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
        folder = device_name(device).partition(",")[0].lower().replace(" ", "-").replace("(r)", "")
        return ROOT / "bench" / "results" / (f"cpu-{folder}" if device.type == "cpu" else folder) / name
    return Path(tempfile.mkdtemp(prefix="fastm2rec-bench-")) / name


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write the document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text: times with 20 and 80 % quantiles, the ratio to the best SASRec of the same shape."""
    header = ["model", "computed by", "mode", "batch", "len", "ms / batch", "(20-80 %)", "seq/s", "x SASRec", "bound"]
    lines = [header]
    for row in rows:
        if row.median_ms is None:
            continue
        peer = best_peer(rows, row)
        share = "" if row.bound_share is None else f"{row.bound_share:4.0%} of {row.bound}"
        lines.append(
            [
                row.model, row.impl, row.mode, str(row.batch), str(row.seq_len), f"{row.median_ms:.3f}",
                f"{row.p20_ms:.3f}-{row.p80_ms:.3f}", f"{row.sequences_per_s:,.0f}",
                "" if peer is None else f"{row.median_ms / peer:.2f}", share,
            ]
        )  # fmt: skip
    text = aligned(lines, left={0, 1, 2, 9})
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.skipped is not None:
            what = reasons.setdefault(row.skipped, [])
            label = f"{row.model} {row.impl} {row.mode}"
            if label not in what:
                what.append(label)
    text += [f"skipped: {reason}: {', '.join(what)}" for reason, what in reasons.items()]
    return "\n".join(text)


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


def best_peer(rows: Sequence[Row], row: Row) -> float | None:
    """The time of the fastest SASRec of the same shape and dtype, in milliseconds."""
    shape = (row.batch, row.seq_len, row.dtype)
    times = [
        other.median_ms
        for other in rows
        if other.model == "sasrec" and other.median_ms and (other.batch, other.seq_len, other.dtype) == shape
    ]
    return min(times, default=None)
