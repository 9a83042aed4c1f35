"""The README's results, written from bench/results: no number stands there that is not in a record.

    python bench/report.py
    python bench/report.py --check

Everything between `<!-- results -->` and `<!-- /results -->` is replaced, and the figures in docs/ are drawn anew;
with --check nothing is written, and the exit code is 1 if the README says something else than the records. Each section
is a module of bench/_sections with a function `render(records, docs)`; the experiments' page, docs/experiments.md, is
written by bench/accuracy.py from its own records.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # from a clone, installed or not; this folder itself would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench._results import ROOT
from bench._sections import _record

SECTIONS = ("targets", "kernels", "models", "scaling", "accuracy")  # in the README's order
BEGIN, END = "<!-- results -->", "<!-- /results -->"
NOTE = "<!-- written by bench/report.py from bench/results: edit neither by hand -->"


def render(root: Path, docs: Path) -> str:
    """The block between the markers; figures go to `docs`."""
    records = _record.read(root)
    parts = [importlib.import_module(f"bench._sections.{name}").render(records, docs) for name in SECTIONS]
    return "\n\n".join([NOTE, *filter(None, parts)])


def replaced(readme: str, block: str) -> str:
    """The README with another block.

    Raises:
        ValueError: it does not hold both markers once, in their order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md: expected {BEGIN} and after it {END}, once each")
    head, _, rest = readme.partition(BEGIN)
    return f"{head}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    options = parser.parse_args(arguments)
    path = root / "README.md"
    old = path.read_text()
    if not options.check:
        new = replaced(old, render(root, root / "docs"))
        path.write_text(new)
        print(f"{path}: {'rewritten' if new != old else 'as it was'}")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        docs = Path(scratch)
        # What is only looked for, not drawn, is found where it is.
        for page in (root / "docs").glob("*.md"):
            (docs / page.name).write_text(page.read_text())
        new = replaced(old, render(root, docs))
        missing = [name.name for name in docs.glob("*.png") if not (root / "docs" / name.name).exists()]
    for name in missing:
        print(f"docs/{name} does not exist")
    sys.stdout.writelines(
        difflib.unified_diff(old.splitlines(True), new.splitlines(True), "README.md", "from the records", n=1)
    )
    if old != new or missing:
        print("error: run python bench/report.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
