"""Two result files of the same script, row by row: is B faster than A, slower, or within the noise?

    python bench/compare.py before.json after.json
    python bench/compare.py before.json after.json --fail-above 1.2

The ratio is B's median over A's, below 1 where B is faster. Its band divides B's 20 % quantile by A's 80 % and B's 80 %
by A's 20 %: a difference counts where the band leaves 1 out. The exit code is 0 whatever the ratios are, unless
--fail-above is given and a row's whole band lies above that ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # from a clone, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import _results, roofline

# What makes rows of two files the same measurement; a file has those that its script writes.
KEYS = (
    "script",
    "op",
    "model",
    "phase",
    "positions",
    "impl",
    "mode",
    "dtype",
    "batch",
    "seq_len",
    "d_state",
    "n_items",
)
SAME_MACHINE = ("device", "torch", "triton", "python")


@dataclass(frozen=True)
class Ratio:
    """B over A of one row."""

    label: str
    a_ms: float
    b_ms: float
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "faster" if self.high < 1 else "slower" if self.low > 1 else "within noise"


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The row's identity; a missing phase is "inference", as files had it before there were others."""
    found = {name: row.get(name) for name in KEYS} | {"phase": row.get("phase") or "inference", "script": None}
    return tuple(found.values())


def ratios(a: dict[str, Any], b: dict[str, Any]) -> list[Ratio]:
    """One for each row that both files have measured, in B's order."""
    before = {key(row): row for row in a["rows"] if row.get("median_ms") is not None}
    found = []
    for row in b["rows"]:
        old = before.get(key(row))
        if old is None or row.get("median_ms") is None:
            continue
        found.append(
            Ratio(
                roofline.label(row), old["median_ms"], row["median_ms"], row["median_ms"] / old["median_ms"],
                row["p20_ms"] / old["p80_ms"], row["p80_ms"] / old["p20_ms"],
            )
        )  # fmt: skip
    return found


def table(found: Sequence[Ratio]) -> str:
    lines = [["row", "A ms", "B ms", "B / A", "(band)", ""]]
    lines += [
        [
            one.label,
            f"{one.a_ms:.4g}",
            f"{one.b_ms:.4g}",
            f"{one.ratio:.3f}",
            f"{one.low:.3f}-{one.high:.3f}",
            one.verdict,
        ]
        for one in found
    ]
    return "\n".join(_results.aligned(lines, left={0, 5}))


def _alone(a: dict[str, Any], b: dict[str, Any]) -> int:
    """How many rows only one of the files has measured."""
    measured = [{key(row) for row in document["rows"] if row.get("median_ms") is not None} for document in (a, b)]
    return len(measured[0] ^ measured[1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A.json", help="before")
    parser.add_argument("b", type=Path, metavar="B.json", help="after")
    parser.add_argument("--fail-above", type=float, metavar="RATIO", help="exit code 1 if a row is surely above it")
    options = parser.parse_args(arguments)
    documents = []
    for path in (options.a, options.b):
        try:
            document = json.loads(path.read_text())
            if not isinstance(document["rows"], list):
                raise TypeError("rows is no list")
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{path}: expected a result file with rows: {type(error).__name__}: {error}")
        documents.append(document)
    a, b = documents
    for name in SAME_MACHINE:
        if a.get(name) != b.get(name):
            print(f"note: {name} differs: {a.get(name)} and {b.get(name)}")
    print(f"kernels: {a.get('kernels_tree')} and {b.get('kernels_tree')}")
    found = ratios(a, b)
    if not found:
        parser.error("the files have no measured row in common")
    print(table(found))
    counts = {word: sum(one.verdict == word for one in found) for word in ("faster", "slower", "within noise")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()) + f"; {_alone(a, b)} rows in one file only")
    failed = [one for one in found if options.fail_above is not None and one.low > options.fail_above]
    for one in failed:
        print(f"above {options.fail_above:g}: {one.label}: {one.low:.3f} to {one.high:.3f}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
