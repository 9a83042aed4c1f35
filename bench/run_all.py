"""The run book for a short window on a GPU: one command leaves a complete, honest record.

    python bench/run_all.py --budget-minutes 8 --out results --wheels DIR
    python bench/run_all.py --budget-minutes 30 --record --pack record.tar
    python bench/run_all.py --budget-minutes 3 --device cpu

First correctness (`pytest -m gpu`), then the scripts beside this one, each in a process of its own: the rows that have
targets first, then everything else, at the end compute-sanitizer and the hardware counters. What a script has written
is in the result files within a second, so a run that is killed has lost no row; the same command goes on where it
stopped, for the same kernels on the same device. A script that fails does not stop the others; a row that takes the GPU
with it, as an illegal access does, is left out from then on, and a new process measures the rest. The summary, in
Markdown, says which targets were reached; it is in summary.md too.

torch.compile with max-autotune, the best that the peers can get, may cost a minute and more for a model and shape on a
fresh machine. So the core pass compiles SASRec's pruned form alone, with CUDA graphs and without a search (such rows
are called "compiled, no search"; it is torch's mode "reduce-overhead"); the second pass begins with the same rows and
the whole search. Ratios are to the fastest of SASRec's rows, whatever its mode, and name it.

Nothing but PYTHONPATH is needed: what is not installed is a row that says so. --pack keeps a copy of the record in one
file, which is whole after every step, for a machine that is gone afterwards: unpacked into bench/results/<device>, or
into the folder of --out, it is the record, and the same command goes on from it.

    mkdir -p bench/results/nvidia-h200 && tar -xf record.tar -C bench/results/nvidia-h200
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":  # from a clone, installed or not; this folder itself would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import _child, _correctness, _failure, _merge, _plan, _targets
from bench._results import ROOT, record_folder, row_label, write_json

CORRECTNESS_SHARE = 0.2
CORE_SECONDS, CORE_SHARE = 480.0, 0.4  # the core pass may take this long, or this share of a long budget
SCRIPT_SHARE = 0.6  # of a step's time is the script's own budget, which it overruns by the shape that it is at
START_SECONDS = 8.0  # of a process: imports, the context, the ceilings
END_SECONDS = 10.0  # before a process is ended, it compiles nothing any more
KERNELS_END_SECONDS = 12.0
MOST_LOSSES = 4  # of the GPU, in one step: each takes the time of a start
TAIL_CHARACTERS = 8000  # of what a script printed: its table and, before it, what failed
LEAST_SECONDS = 15.0  # a step with less than this left is not begun
RESERVE_SECONDS = 5.0  # for the summary
PACKAGES = ("selective_scan_cuda", "causal_conv1d")  # what the wheels are for
CHECKS = ("sanitize", "counters")  # their rows have no times
NO_TARGETS = "They are set for a GPU: times of a CPU settle none of them."
PROBE = """
import json, sys, torch
import fastm2rec
from bench import _results
device = torch.device(sys.argv[1] or ("cuda" if torch.cuda.is_available() else "cpu"))
print("PROBE" + json.dumps(_results.document(device, [])))
"""


class Run:
    """One run: where it writes, how much time is left, what became of its steps."""

    def __init__(
        self, out: Path, header: dict[str, Any], environment: dict[str, str], stop: float, pack: Path | None = None
    ) -> None:
        self.out = out
        self.pack = pack
        self.scripts = ROOT / "bench"
        self.header = header
        self.environment = environment
        self.stop = stop
        self.state = _merge.read(out / "run_all.json") or {"rows": []}
        if not _merge.same_origin(self.state, header):
            self.state = {"rows": []}
        self.state = {**header, "rows": self.state["rows"], "correctness": self.state.get("correctness")}
        self.notes: list[str] = []
        for part in sorted((out / ".parts").glob("*.json")):  # of a run that was killed
            self.collect(part)

    def left(self) -> float:
        return self.stop - time.monotonic() - RESERVE_SECONDS

    def save(self) -> None:
        """Write down how far the run is, and pack the record."""
        write_json(self.out / "run_all.json", self.state)
        (self.out / "summary.md").write_text(self.summary())
        if self.pack is not None:
            pack(self.out, self.pack)

    def rows(self, script: str) -> list[dict[str, Any]]:
        """What is known already."""
        found = _merge.read(self.out / f"{script}.json")
        return found["rows"] if found is not None and _merge.same_origin(found, self.header) else []

    def collect(self, part: Path) -> None:
        """Move a script's rows so far into its result file; a part's name is the script's, and whether it was quick."""
        found = _merge.read(part)
        if found is not None:
            script, _, quick = part.stem.partition(".")
            _merge.merge(self.out / f"{script}.json", found, script, bool(quick))

    def correctness(self) -> None:
        """Run the tests, those that did not run to their end before."""
        if _correctness.is_complete(self.state["correctness"]):
            print("correctness: known from the run before", flush=True)
            return
        seconds = CORRECTNESS_SHARE * self.left()
        print(f"correctness, at most {seconds:.0f} s ...", flush=True)
        known = self.state["correctness"]
        kind, environment = self.header["device_type"], self.environment
        self.state["correctness"] = _correctness.run(ROOT, kind, environment, seconds, known)
        print(f"  {_correctness.summary(self.state['correctness'])}", flush=True)
        self.save()

    def step(self, step: _plan.Step, seconds: float) -> None:
        """Run one script for what is missing of its rows."""
        known = self.rows(step.script)
        lengths = step.missing(known)
        done = any(one["name"] == step.name and one["status"] == "done" for one in self.state["rows"])
        if step.script == "kernels":  # resumes row by row itself
            done = done and all(map(_merge.is_final, known))
        if (step.lengths and not lengths) or (done and not step.lengths):
            print(f"{step.name}: known from the run before", flush=True)
            return
        if seconds < LEAST_SECONDS:
            self._note(step, "not begun: no time left", 0.0, "")
            return
        script = self.scripts / f"{step.script}.py"
        if not script.exists():
            self._note(step, f"not begun: bench/{script.name} does not exist", 0.0, "")
            return
        stop, spent = time.monotonic() + seconds, 0.0
        for losses in range(MOST_LOSSES + 1):
            outcome, is_lost = self._attempt(step, lengths, stop - time.monotonic())
            spent += outcome.seconds
            if not is_lost or losses == MOST_LOSSES or stop - time.monotonic() < LEAST_SECONDS:
                break
            lengths = step.missing(self.rows(step.script))
            if step.lengths and not lengths:
                break
            print("  the GPU was lost: the rest in a new process", flush=True)
        self._note(step, outcome.status, spent, outcome.tail)

    def _attempt(self, step: _plan.Step, lengths: Sequence[int], seconds: float) -> tuple[_child.Outcome, bool]:
        """One process for the step; what became of it, and whether it lost its GPU."""
        known = self.rows(step.script)
        part = self.out / ".parts" / f"{step.script}{'.quick' if step.quick else ''}.json"
        part.parent.mkdir(exist_ok=True)
        part.unlink(missing_ok=True)
        script = self.scripts / f"{step.script}.py"
        command = [sys.executable, str(script), *step.words(lengths), "--device", self.header["device_type"]]
        own, limit = SCRIPT_SHARE * seconds - START_SECONDS, seconds - START_SECONDS - END_SECONDS
        if step.core:  # shapes are in the order of their worth: rather the first ones whole than a part of each
            own = limit
        if step.script == "kernels":  # keeps a part of its budget, in which it compiles nothing, for what it is at
            own = seconds - START_SECONDS - KERNELS_END_SECONDS
        command += ["--budget-seconds", f"{max(1.0, own):.0f}", "--out", str(part)]
        if step.compares_models:
            command += ["--limit-seconds", f"{max(1.0, limit):.0f}"]
            culprits = [row_label(row) for row in known if _merge.is_culprit(row)]
            command += ["--leave-out", *culprits] if culprits else []
        if step.script == "kernels":
            command += ["--resume"]
            write_json(part, {**self.header, "rows": known})
        print(f"{step.name}, at most {seconds:.0f} s ...", flush=True)
        outcome = _child.run(command, self.environment, ROOT, seconds, lambda: self.collect(part))
        self.collect(part)
        found = _merge.read(part) or {"rows": []}
        is_lost = outcome.code == _failure.EXIT_CODE
        is_lost = is_lost or any(row.get("skipped") == _failure.WAITING for row in found["rows"])
        part.unlink(missing_ok=True)
        print(f"  {outcome.status} after {outcome.seconds:.0f} s", flush=True)
        if outcome.status == "failed":
            print("  " + "\n  ".join(outcome.tail.strip().splitlines()[-12:]), flush=True)
        return outcome, is_lost

    def _note(self, step: _plan.Step, status: str, seconds: float, tail: str) -> None:
        others = [one for one in self.state["rows"] if one["name"] != step.name]
        row = {"name": step.name, "script": step.script, "core": step.core, "status": status}
        self.state["rows"] = [*others, {**row, "seconds": round(seconds, 1), "tail": tail[-TAIL_CHARACTERS:]}]
        self.save()

    def all_steps(self) -> None:
        """Both passes; what a step leaves of its share goes to the next ones."""
        planned = _plan.steps(self.header["device_type"])
        core_stop = time.monotonic() + max(min(self.left(), CORE_SECONDS), CORE_SHARE * self.left())
        for core in (True, False):
            waiting = [step for step in planned if step.core == core]
            while waiting:
                left = min(self.left(), core_stop - time.monotonic()) if core else self.left()
                share = left * waiting[0].weight / sum(step.weight for step in waiting)
                # A share too small to start in is worth more to the next step in line.
                self.step(waiting.pop(0), min(left, max(share, LEAST_SECONDS)))

    def summary(self) -> str:
        """Markdown: what ran, what was right, which targets were reached."""
        head = self.header
        rows = {script: self.rows(script) for script in {step.script for step in _plan.steps(head["device_type"])}}
        text = [
            f"# {head['device']}",
            f"torch {head['torch']}, Triton {head['triton']}, Python {head['python']}, kernels {head['kernels_tree']}, "
            f"{head['created']}",
            *(f"**{note}**" for note in self.notes),
        ]
        checked = self.state["correctness"]
        text += ["## Correctness", "not run" if checked is None else _correctness.summary(checked)]
        is_gpu = head["device_type"] == "cuda"
        text += ["## Targets", _targets.table(_targets.evaluate(rows)) if is_gpu else NO_TARGETS, "## Steps"]
        lines = ["| step | status | seconds |", "|---|---|---|"]
        lines += [f"| `{one['name']}` | {one['status']} | {one['seconds']} |" for one in self.state["rows"]]
        text += ["\n".join(lines), "## Rows"]
        counts = []
        for script, own in sorted(rows.items()):
            if script in CHECKS:
                errors = [row for row in own if row.get("result", "clean") != "clean"]
                counts.append(f"* {script}: {len(own)} rows, {len(errors)} of them not clean")
                counts += [f"  * {row['op']}, {row['mode']}: {row['result']}" for row in errors]
                continue
            timed = sum(row.get("median_ms") is not None or row.get("peak_mem_mb") is not None for row in own)
            wrong = [row for row in own if (row.get("skipped") or "").startswith("wrong")]
            counts.append(f"* {script}: {timed} measured, {len(own) - timed} skipped, {len(wrong)} of them wrong")
            counts += [f"  * {_merge.key(row)}: {row['skipped']}" for row in wrong]
        return "\n\n".join([*text, "\n".join(counts)]) + "\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--budget-minutes", type=float, required=True, metavar="M", help="end by then, whatever is done")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="DIR", help="write here (default: a temporary folder)")
    where.add_argument("--record", action="store_true", help="write to bench/results/<device>")
    add("--wheels", type=Path, metavar="DIR", help="wheels of mamba-ssm and causal-conv1d, put beside for this run")
    add("--pack", type=Path, metavar="FILE.tar", help="keep a copy of the record in this file, whole after every step")
    add("--device", choices=["cpu", "cuda"], default="", help="default: cuda where there is one")
    options = parser.parse_args(arguments)
    if not options.budget_minutes > 0:
        parser.error(f"--budget-minutes: expected more than 0, got {options.budget_minutes:g}")
    if options.wheels is not None and not list(options.wheels.glob("*.whl")):
        parser.error(f"--wheels {options.wheels}: expected a folder with .whl files, found none")
    return options


def probe(environment: dict[str, str], device: str) -> dict[str, Any] | str:
    """What the results' header will say, found out in a process of its own; or why that fails."""
    command = [sys.executable, "-c", PROBE, device]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("PROBE"):
            return {**json.loads(line.removeprefix("PROBE")), "kernels_tree": _merge.kernels_tree()}
    return done.stderr.strip()[-1500:] or f"exit code {done.returncode}"


def with_wheels(folder: Path, environment: dict[str, str], site: Path) -> tuple[dict[str, str], str | None]:
    """The environment with the wheels unpacked in `site`; or as it was, and why they cannot be used."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    command += ["--target", str(site), *map(str, sorted(folder.glob("*.whl")))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return environment, f"the wheels were not installed: {_last_line(done.stderr)}"
    new = {**environment, "PYTHONPATH": os.pathsep.join([environment["PYTHONPATH"], str(site)])}
    command = [sys.executable, "-c", f"import torch, {', '.join(PACKAGES)}"]
    done = subprocess.run(command, env=new, capture_output=True, text=True, check=False)
    if done.returncode:
        return environment, f"the wheels do not import, and are left out: {_last_line(done.stderr)}"
    return new, None


def _last_line(text: str) -> str:
    return next(iter(text.strip().splitlines()[::-1]), "no message")[:400]


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    stop = time.monotonic() + 60 * options.budget_minutes
    signal.signal(signal.SIGTERM, _stop)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    header = probe(environment, options.device)
    if isinstance(header, str):
        print(f"error: fastm2rec or torch does not import here, wheels or not:\n{header}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="fastm2rec-wheels-") as site:
        note = None
        if options.wheels is not None:
            environment, note = with_wheels(options.wheels, environment, Path(site))
            again = probe(environment, options.device)
            if isinstance(again, str):
                print(f"error: with the wheels, fastm2rec does not import any more:\n{again}", file=sys.stderr)
                return 2
        run = Run(_folder(options, header), header, environment, stop, options.pack)
        run.notes += [note] if note else []
        print(
            f"{header['device']}; torch {header['torch']}; kernels {header['kernels_tree']}; to {run.out}", flush=True
        )
        if note:
            print(note, flush=True)
        try:
            run.correctness()
            run.all_steps()
        finally:
            run.save()
            text = run.summary()
            with contextlib.suppress(OSError):  # absent, or not empty
                (run.out / ".parts").rmdir()
            print("\n" + text, flush=True)
    return 0


def pack(folder: Path, path: Path) -> None:
    """The record's files as a tar without folders, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w") as tar:
        for file in sorted([*folder.glob("*.json"), *folder.glob("*.md")]):
            tar.add(file, file.name)
    partial.replace(path)


def _folder(options: argparse.Namespace, header: dict[str, Any]) -> Path:
    if options.record:
        folder = record_folder(header["device"], header["device_type"])
    else:
        folder = options.out or Path(tempfile.mkdtemp(prefix="fastm2rec-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
