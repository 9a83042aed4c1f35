"""What the kernels need of a GPU, found out without one: registers, spills, shared memory, instructions, bounds.

    python bench/resources.py
    python bench/resources.py --arch 90 --ops selective_scan last_state --jobs 8

Every launch in bench/launches goes through the real launcher and Triton's whole compiler; nothing runs. The loop is the
hottest one of a kernel, and MUFU counts special functions in it. Cycles are a multiprocessor's for one iteration of one
program, were nothing ever waited for: of its issue slots and of its special-function units. A kernel that fails a gate
makes the exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # from a clone, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import _gates, _results
from bench.launches._launch import Launch, collect, ops

if TYPE_CHECKING:  # needs triton, which may be absent
    from bench._report import Report


@dataclass(frozen=True)
class Row:
    """One kernel of one launch on one architecture; without a report where it did not get that far."""

    launch: Launch
    arch: int
    kernel: str
    report: Report | None
    failed: list[str]

    def record(self) -> dict[str, Any]:
        """As it is written to JSON."""
        row: dict[str, Any] = {"op": self.launch.op, "case": self.launch.name, "arch": self.arch}
        if self.report is not None:
            row |= asdict(self.report) | {
                "issue_cycles": self.report.issue_cycles,
                "mufu_cycles": self.report.mufu_cycles,
                "bound": self.report.bound,
            }
            row |= {f"{kind}_per_element": value for kind, value in self.per_element().items()}
        return row | {"kernel": self.kernel, "failed": self.failed}

    def per_element(self) -> dict[str, float]:
        """Instructions per element, where the launch says how many elements there are."""
        if self.report is None or self.report.kernel not in self.launch.mufu:
            return {}
        _, elements = self.launch.mufu[self.report.kernel]
        return {
            "issue": self.report.per_element(self.report.loop_instructions, elements),
            "mufu": self.report.per_element(self.report.loop_mix["mufu"], elements),
        }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", type=int, nargs="+", choices=_gates.ARCHS, help="compute capabilities (default: all)")
    add("--ops", nargs="+", choices=ops(), help="which ops (default: all)")
    add("--core", action="store_true", help="only the launches that the tests compile")
    add("--jobs", type=int, default=1, help="processes that compile (default: 1)")
    add("--json", metavar="FILE", help="write the rows here")
    add("--record", action="store_true", help="write the rows to bench/results/resources; takes all of them")
    options = parser.parse_args(arguments)
    if options.record and (options.arch or options.ops or options.core):
        parser.error("--record: expected none of --arch, --ops and --core, since a record holds every kernel")
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    return options


def unavailable() -> str | None:
    """Why nothing can be compiled in this process; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fastm2rec[triton]')"
    import triton

    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, and Triton's interpreter compiles nothing: unset it"
    return None


def compiled(launch: Launch, arch: int) -> list[Report] | str:
    """What a launch launches, or why it does not compile."""
    from bench._dry import compiled_by
    from bench._report import report

    try:
        return [report(one) for one in compiled_by(launch.run, arch)]
    except Exception as error:  # a kernel that does not compile is a row that fails, not the end of the run
        message = " ".join(str(error).split())
        return f"{type(error).__name__}: {'... ' * (len(message) > 200)}{message[-200:]}"


def _compiled_by_name(op: str, name: str, arch: int) -> list[Report] | str:
    (launch,) = [launch for launch in collect([op]) if launch.name == name]
    return compiled(launch, arch)


def _in_processes(work: Sequence[tuple[Launch, int]], jobs: int) -> Iterator[list[Report] | str]:
    # A process finds the launch by its name: its function cannot be sent.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(_compiled_by_name, launch.op, launch.name, arch) for launch, arch in work]
        yield from (one.result() for one in waiting)


def gated(launch: Launch, arch: int, reports: list[Report] | str) -> list[Row]:
    """The rows of one launch on one architecture, put to the gates."""
    if isinstance(reports, str):
        return [Row(launch, arch, "-", None, [reports])]
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for one in reports:
        seen[one.kernel] = seen.get(one.kernel, 0) + 1
        name = one.kernel if seen[one.kernel] == 1 else f"{one.kernel} ({seen[one.kernel]})"
        rows.append(Row(launch, arch, name, one, _gates.failures(launch, one)))
    absent = _gates.missing(launch, reports)
    return [*rows, Row(launch, arch, "-", None, absent)] if absent else rows


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    header = [
        "op", "case", "kernel", "sm", "warps", "regs", "spill", "shared", "blocks", "occup.",
        "loop", "MUFU", "dot", "FFMA", "LDG", "STG", "LDS", "STS", "SHFL", "BAR",
        "issue cyc.", "MUFU cyc.", "issue/el.", "MUFU/el.", "gates",
    ]  # fmt: skip
    lines = [header]
    for row in rows:
        line = [row.launch.op, row.launch.name, row.kernel, str(row.arch)]
        if row.report is None:
            line += [""] * (len(header) - len(line) - 1)
        else:
            one, mix, per = row.report, row.report.loop_mix, row.per_element()
            line += [
                str(one.warps), str(one.registers), str(one.spill_bytes), str(one.shared), str(one.blocks_per_sm),
                f"{one.occupancy:.0%}", str(one.loop_instructions),
                *(str(mix[kind]) for kind in ("mufu", "dot", "ffma", "ldg", "stg", "lds", "sts", "shfl", "bar")),
                f"{one.issue_cycles:.0f}", f"{one.mufu_cycles:.0f}",
                *(f"{per[kind]:.2f}" if per else "" for kind in ("issue", "mufu")),
            ]  # fmt: skip
        lines.append([*line, "FAILED: " + "; ".join(row.failed) if row.failed else "ok"])
    return "\n".join(_results.aligned(lines, left={0, 1, 2, len(header) - 1}))


def document(rows: Sequence[Row], origin: dict[str, Any]) -> dict[str, Any]:
    """The rows with everything that is needed to know what they mean."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = {str(arch): get_ptxas(arch).version for arch in sorted({row.arch for row in rows})}
    where = {"device": None, "device_type": "compiled ahead of time", "ptxas": ptxas}
    return {"schema": _results.SCHEMA, **where, **origin, "rows": [row.record() for row in rows]}


def main(arguments: Sequence[str] | None = None, launches: Sequence[Launch] | None = None) -> int:
    """Print the table of `launches` (default: those of bench/launches) and return the exit code."""
    options = parse(arguments)
    reason = unavailable()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    chosen = collect(options.ops or ops()) if launches is None else launches
    work = [
        (launch, arch) for launch in chosen if launch.core or not options.core for arch in options.arch or _gates.ARCHS
    ]
    results: Iterable[list[Report] | str] = (
        _in_processes(work, options.jobs)
        if options.jobs > 1 and launches is None
        else (compiled(launch, arch) for launch, arch in work)
    )
    origin = _results.origin()  # now, with the kernels that were imported
    rows: list[Row] = []
    for (launch, arch), reports in zip(work, results, strict=True):
        rows += gated(launch, arch, reports)
        print(f"  {launch.op}, {launch.name}, sm_{arch}", file=sys.stderr, flush=True)
    print(table(rows))
    failed = sum(bool(row.failed) for row in rows)
    print(f"{len(rows)} rows, {failed} failed")
    record = document(rows, origin)
    if options.json:
        _results.write_json(Path(options.json), record)
    if options.record:
        path = _results.ROOT / "bench" / "results" / "resources" / f"triton-{record['triton']}.json"
        _results.write_json(path, record)
        print(f"rows: {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
