"""What bounds each hot kernel, read from the hardware's counters by Nsight Compute (ncu).

    python bench/counters.py
    python bench/counters.py --ops encode_last

For every Triton kernel of an op: time, registers, occupancy, and the share of the peak of memory, of the issue slots,
of the busiest pipe and of the special-function units. The clocks are left as they are. Needs a GPU and ncu.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # from a clone, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import _child, _results, _small

# Sections exist for every GPU; of single metrics only one is asked for, as a name that a GPU lacks ends the whole run.
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "LaunchStats", "Occupancy")
SPECIAL = "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active"
COLUMNS = {
    "Duration": "ns",
    "DRAM Throughput": "DRAM %",
    "Memory Throughput": "memory %",
    "Issue Slots Busy": "issue %",
    "SM Busy": "busiest pipe %",
    SPECIAL: "special %",
    "Achieved Occupancy": "occup. %",
    "Registers Per Thread": "regs",
}
MOST_LAUNCHES = 60


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ops", nargs="+", choices=_small.OPS, default=list(_small.OPS), help="default: all")
    add("--device", choices=["cuda"], default="cuda", help="there is no other")
    add("--budget-seconds", type=float, default=600, help="begin nothing new after this (default: 600)")
    add("--out", type=Path, metavar="FILE", help="write the results as JSON")
    return parser.parse_args(arguments)


def kernel_names() -> list[str]:
    """The package's kernels: torch's, which run beside them, would use up the launches."""
    sources = sorted((_results.ROOT / "kernels").glob("*.py"))
    return [name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)]


def read(text: str) -> list[dict[str, str]]:
    """Kernel and metrics by our names, one entry per kernel name, from what `ncu --csv` prints around other output."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"')))):
        kernel = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if (name := COLUMNS.get(row["Metric Name"])) is not None:
            kernel.setdefault(name, row["Metric Value"])
    # The last launch of a name: earlier ones may be an autotuner's.
    return list({entry["kernel"]: entry for entry in found.values()}.values())


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    executable = shutil.which("ncu")
    if executable is None:
        print("skipped: ncu is not installed (Nsight Compute; it comes with the CUDA toolkit)")
        return 0
    stop = time.monotonic() + options.budget_seconds
    columns = list(COLUMNS.values())
    lines = [["op", "kernel", *columns]]
    rows: list[dict[str, str]] = []
    failed = False
    for op in options.ops:
        left = stop - time.monotonic()
        if left <= 0:
            lines.append([op, "not begun: --budget-seconds", *[""] * len(columns)])
            continue
        command = [executable, "--clock-control", "none", "--csv", "--print-units", "base", "--target-processes", "all"]
        command += ["--kernel-name", f"regex:^({'|'.join(kernel_names())})$", "--launch-count", str(MOST_LAUNCHES)]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += ["--metrics", SPECIAL, sys.executable, str(Path(_small.__file__)), op, "--hot"]
        log = _child.run(command, dict(os.environ), _results.ROOT, left)
        entries = read(log.tail)
        if not entries:
            failed = True
            print(f"{op}: {log.status}: {log.tail[-1500:]}", file=sys.stderr)
        for entry in entries:
            lines.append([op, entry["kernel"], *(entry.get(name, "") for name in columns)])
            rows.append({"op": op, "phase": "counters", "impl": "triton", "mode": entry["kernel"], **entry})
        if options.out:
            _results.write_json(options.out, _results.document(torch.device(options.device), []) | {"rows": rows})
    print("\n".join(_results.aligned(lines, left={0, 1})))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
