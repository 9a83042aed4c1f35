"""pytest before the benchmarks, within a share of the time: files side by side: compiling takes processors."""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import _child

# Without a GPU: what the CPU engine computes.
ON_CPU = ("tests/test_cpu_spectral_projection.py",)
RESULT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)
# Kernels first: their results decide what the times are worth.
LAST = ("test_bench", "test_mamba_ssm")
MOST_AT_ONCE = 8
TAIL_CHARACTERS = 3000  # of what pytest printed for a file


def files(root: Path, device: str) -> list[str]:
    """The test files to run on "cuda" or "cpu"."""
    if device == "cpu":
        return list(ON_CPU)
    marked = [path for path in sorted((root / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    marked.sort(key=lambda path: path.stem.startswith(LAST))
    return [str(path.relative_to(root)) for path in marked]


def run(
    root: Path, device: str, environment: Mapping[str, str], seconds: float, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run them; what is not finished in time is stopped and counts as not finished.

    Args:
        root: the project.
        device: "cuda" or "cpu".
        environment: of the processes.
        seconds: for all of them.
        before: the result of an earlier run; files that ran to their end in it are not run again.

    Returns:
        Counts of passed, failed and skipped tests, the names of failed ones, the files that did not finish, the end
        of the output of files that failed without a failing test, the seconds it took, and `files`: all of that of each
        file, with the end of what pytest printed where something failed or did not end.
    """
    kept = {name: one for name, one in ((before or {}).get("files") or {}).items() if one["status"] == "ended"}
    waiting = [name for name in files(root, device) if name not in kept]
    begun = time.monotonic()
    found = _side_by_side(root, waiting, ["-m", "gpu" if device == "cuda" else "not slow"], environment, seconds)
    spent = time.monotonic() - begun + (before["seconds"] if before and kept else 0.0)
    return _total(kept | found, spent)


def _total(by_file: Mapping[str, Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    counts = {word: sum(one[word] for one in by_file.values()) for word in ("passed", "failed", "skipped")}
    return {
        **counts,
        "failures": sorted(failure for one in by_file.values() for failure in one["failures"]),
        "unfinished": sorted(name for name, one in by_file.items() if one["status"] == "unfinished"),
        "broken": {name: one["tail"] for name, one in by_file.items() if one["status"] == "broken"},
        "seconds": round(seconds, 1),
        "files": dict(by_file),
    }


def _of_file(status: str, output: str) -> dict[str, Any]:
    results = RESULT.findall(output)
    counts = Counter(word for _, word in results)
    failures = sorted(name for name, word in results if word in ("FAILED", "ERROR"))
    return {
        "status": status,
        "passed": counts["PASSED"],
        "failed": len(failures),
        "skipped": counts["SKIPPED"],
        "failures": failures,
        "tail": output[-TAIL_CHARACTERS:] if failures or status != "ended" else "",
    }


def _side_by_side(
    root: Path, waiting: list[str], chosen: Sequence[str], environment: Mapping[str, str], seconds: float
) -> dict[str, dict[str, Any]]:
    begun = time.monotonic()
    at_once = max(1, min(MOST_AT_ONCE, (os.cpu_count() or 1) // 2))
    running: dict[str, _child.Child] = {}
    found: dict[str, dict[str, Any]] = {}

    def close(name: str) -> None:
        child = running.pop(name)
        was_running = child.is_running()
        output = child.output()
        outcome = child.end()
        ended = outcome.code in (0, 1, 5)  # pytest's: passed, some failed, nothing to run
        found[name] = _of_file("unfinished" if was_running else "ended" if ended else "broken", output)

    try:
        while (waiting or running) and time.monotonic() - begun < seconds:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                command = [sys.executable, "-m", "pytest", name, *chosen, "-v", "--tb=short", "-p", "no:cacheprovider"]
                running[name] = _child.Child(command, environment, root)
            time.sleep(_child.POLL_SECONDS)
            for name in [name for name, child in running.items() if not child.is_running()]:
                close(name)
    finally:
        for name in list(running):
            close(name)
    return found | {name: _of_file("unfinished", "") for name in waiting}


def is_complete(result: Mapping[str, Any] | None) -> bool:
    """Everything ran to its end."""
    return result is not None and not result["unfinished"] and not result["broken"]


def summary(result: Mapping[str, Any]) -> str:
    """One paragraph of Markdown."""
    text = (
        f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped in {result['seconds']:g} s"
    )
    if result["failures"]:
        text += "; failed: " + ", ".join(f"`{name}`" for name in result["failures"])
    if result["unfinished"]:
        text += "; not finished in their share of the time: " + ", ".join(f"`{name}`" for name in result["unfinished"])
    for name, tail in result["broken"].items():
        text += f"; `{name}` did not run: {' '.join(tail.split())[-300:]}"
    return text
