"""compute-sanitizer over small shapes of every kernel: accesses out of bounds (memcheck) and races (racecheck).

    python bench/sanitize.py
    python bench/sanitize.py --ops last_state --tools memcheck

Needs a GPU and NVIDIA's compute-sanitizer, whose racecheck looks at shared memory alone: what programs hand to each
other in global memory, the scratch of `encode_last` and of the scans, is for the tests that repeat a call and compare.
torch's caching allocator is off, so that a step beyond a tensor is seen.
The exit code is 1 if a tool found something.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # from a clone, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import _child, _results, _small

TOOLS = ("memcheck", "racecheck")
ERROR_CODE = 87  # no program of ours ends with it
EXECUTABLE = "compute-sanitizer"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ops", nargs="+", choices=_small.OPS, default=list(_small.OPS), help="default: all")
    add("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="default: both")
    add("--device", choices=["cuda"], default="cuda", help="there is no other")
    add("--budget-seconds", type=float, default=600, help="begin nothing new after this (default: 600)")
    add("--out", type=Path, metavar="FILE", help="write the results as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    executable = shutil.which(EXECUTABLE)
    if executable is None:
        print(f"skipped: {EXECUTABLE} is not installed (it comes with the CUDA toolkit)")
        return 0
    stop = time.monotonic() + options.budget_seconds
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    lines = [["op", "tool", "result", "seconds"]]
    rows = []
    for tool in options.tools:
        for op in options.ops:
            left = stop - time.monotonic()
            if left <= 0:
                lines.append([op, tool, "not begun: --budget-seconds", ""])
                continue
            command = [executable, "--tool", tool, "--error-exitcode", str(ERROR_CODE), "--target-processes", "all"]
            command += [sys.executable, str(Path(_small.__file__)), op]
            outcome = _child.run(command, environment, _results.ROOT, left)
            result = {0: "clean", ERROR_CODE: "FOUND ERRORS"}.get(outcome.code, outcome.status)  # type: ignore[arg-type]
            lines.append([op, tool, result, f"{outcome.seconds:.0f}"])
            rows.append({"op": op, "phase": "check", "impl": "triton", "mode": tool, "result": result})
            if result != "clean":
                print(outcome.tail, file=sys.stderr)
            if options.out:
                document = _results.document(torch.device(options.device), [])
                _results.write_json(options.out, document | {"rows": rows})
    print("\n".join(_results.aligned(lines, left={0, 1, 2})))
    return 1 if any(row["result"] != "clean" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
