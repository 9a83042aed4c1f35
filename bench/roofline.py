"""How near every measured row comes to what bounds it, as a figure.

    python bench/roofline.py bench/results/*/kernels.json --out roofline.png

A bar for each implementation of each shape: the share of the bound that it reached, by the resource that bounds it.
Takes the files of every script that writes bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # from a clone, installed or not; this folder itself would shadow other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.peers._problem import LENGTHLESS

COLOURS = {
    "special functions": "#0b6e99", "arithmetic": "#c8553d", "memory": "#5b8c3a", "launch": "#8d6a9f",
}  # fmt: skip
MOST_BARS = 60  # more do not fit on a page


def label(row: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    op = row.get("op") or row.get("model")
    phase = row.get("phase") or "inference"
    states = f", N={row['d_state']}" if row.get("d_state") else ""
    size = f"B={row['batch']}" + ("" if op in LENGTHLESS else f", L={row['seq_len']}")
    return f"{op} {phase}, {row['dtype']}, {size}{states}: {row['impl']}, {row['mode']}"


def draw(documents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the PNG.

    Raises:
        ValueError: no row has a share of a bound, or there are more than fit on a page.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    rows = [row for document in documents for row in document["rows"] if row.get("bound_share") is not None]
    if not rows:
        raise ValueError("expected at least one measured row with a bound, got none")
    if len(rows) > MOST_BARS:
        raise ValueError(f"expected at most {MOST_BARS} rows on one page, got {len(rows)}: choose some with --only")
    figure, axes = plt.subplots(figsize=(9.5, 1.6 + 0.24 * len(rows)), layout="constrained")
    places = range(len(rows), 0, -1)
    unknown = {row["bound"] for row in rows} - COLOURS.keys()
    colours = COLOURS | dict.fromkeys(sorted(unknown), "#777777")
    axes.barh(places, [100 * row["bound_share"] for row in rows], color=[colours[row["bound"]] for row in rows])
    for place, row in zip(places, rows, strict=True):
        axes.annotate(
            f"{100 * row['bound_share']:.{0 if row['bound_share'] >= 0.1 else 1}f} %  ({row['median_ms']:.3g} ms)",
            (100 * row["bound_share"], place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7,
        )  # fmt: skip
    axes.set_yticks(places, [label(row) for row in rows], fontsize=7)
    axes.set_xlim(0, max(115.0, 125 * max(row["bound_share"] for row in rows)))
    axes.set_ylim(0.2, len(rows) + 0.8)
    axes.axvline(100, color="#333333", linewidth=0.8)
    axes.set_xlabel("share of the bound that was reached, %")
    used = [name for name in colours if any(row["bound"] == name for row in rows)]
    figure.legend(
        handles=[Patch(color=colours[name], label=name) for name in used], title="bounded by", fontsize=7,
        title_fontsize=7, loc="outside upper right", ncols=len(used),
    )  # fmt: skip
    devices = dict.fromkeys(f"{document['device']}, torch {document['torch']}" for document in documents)
    figure.suptitle("; ".join(devices), fontsize=9, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="result files")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows whose label holds all of these words")
    parser.add_argument("--out", type=Path, default=Path("roofline.png"), help="the PNG (default: roofline.png)")
    options = parser.parse_args(arguments)
    documents = []
    for path in options.files:
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"{path}: expected a result file: {error}")
        rows = [row for row in document["rows"] if row.get("median_ms") is not None]
        document["rows"] = [row for row in rows if all(word in label(row) for word in options.only or [])]
        documents.append(document)
    try:
        draw(documents, options.out)
    except ValueError as error:
        parser.error(str(error))
    print(f"figure: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
