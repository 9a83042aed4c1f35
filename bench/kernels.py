"""Every op of the package, forward and backward, against whatever else computes the same.

    python bench/kernels.py
    python bench/kernels.py --ops selective_scan last_state --dtype bfloat16 --core
    python bench/kernels.py --autotune --budget-seconds 600 --out kernels.json --resume

On CUDA: the Triton kernels against torch eager and compiled, torch.fft, cuFFT through CuPy, mamba-ssm. On a CPU: the
numba engine against plain PyTorch, eager and compiled. Every implementation is checked against the reference before it
is timed; those of one shape are timed in turn. Core shapes come first; cuFFT, which may end the process, comes last, by
itself. On CUDA the time is the device's: an op is one of many in a model, whose launches are queued ahead.

torch.compile takes seconds for each peer and shape; with its search over matrix-product kernels (--autotune) it takes
tens of seconds, up to minutes. Nothing is compiled after 80 % of --budget-seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # from a clone, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import _bounds, _failure, _merge, _results
from bench._measure import Row, blank, measure
from bench._tree import tree_hash
from bench.peers._problem import LENGTHLESS, PHASES, Peer, Problem, Shape

OPS = (
    "spectral_projection", "selective_scan", "last_state", "gated_fusion", "encode_last", "last_scan",
    "filtered_last_scan", "cross_entropy", "embed_norm", "output_ffn", "causal_conv1d",
)  # fmt: skip
FOREIGN = ("spectral_projection",)  # ops that have a peer which may end the process
COMPILE_SHARE = 0.8  # of the budget, after which nothing more is compiled
LEAST_SECONDS = 0.5  # of timing for a shape, whatever the budget
ENDED = "the process ended while it was measured"  # final: it would end the next one too
NOT_REACHED = "the time budget ran out before it was reached (--budget-seconds)"

# The shapes for which targets are set come first.
CORE = {
    "cuda": [
        Shape("spectral_projection", "forward", "bfloat16", 2048, 200, None),
        Shape("selective_scan", "forward", "bfloat16", 2048, 200),
        Shape("last_state", "forward", "bfloat16", 2048, 200),
        Shape("gated_fusion", "forward", "bfloat16", 4096, 1, None),
        Shape("encode_last", "forward", "bfloat16", 4096, 200, 16),
        Shape("encode_last", "forward", "bfloat16", 4096, 200, 32),
        Shape("selective_scan", "training", "bfloat16", 2048, 200),
        Shape("last_state", "training", "bfloat16", 2048, 200),
        Shape("spectral_projection", "training", "bfloat16", 2048, 200, None),
        Shape("gated_fusion", "training", "bfloat16", 4096, 1, None),
    ],
    "cpu": [
        Shape("last_scan", "forward", "float32", 32, 200),
        Shape("spectral_projection", "forward", "float32", 32, 200, None),
        Shape("encode_last", "forward", "float32", 32, 200),
        Shape("last_scan", "training", "float32", 32, 200),
        Shape("spectral_projection", "training", "float32", 32, 200, None),
        Shape("filtered_last_scan", "training", "float32", 32, 200),
    ],
}
ROWS = 409600  # positions of a batch, where lengths are compared
REST = {
    "cuda": [
        # Where the two routes of the filter cross.
        *(
            Shape("spectral_projection", "forward", "bfloat16", ROWS // length, length, None)
            for length in (50, 1024, 4096, 8192)
        ),
        *(
            Shape("encode_last", "forward", "bfloat16", batch, length)
            for batch, length in ((1, 50), (1, 200), (4096, 50), (1024, 1024))
        ),
        *(
            Shape(op, phase, dtype, 2048, 200, d_state)
            for op in ("selective_scan", "last_state")
            for phase in PHASES
            for dtype, d_state in (("bfloat16", 32), ("float32", 16))
        ),
        *(Shape(op, "forward", "bfloat16", 256, 1600) for op in ("selective_scan", "last_state")),
        *(Shape("spectral_projection", phase, "float32", 2048, 200, None) for phase in PHASES),
        Shape("gated_fusion", "forward", "float32", 4096, 1, None),
        Shape("encode_last", "forward", "float32", 4096, 200),
        *(Shape("causal_conv1d", phase, "bfloat16", 2048, 200, None) for phase in PHASES),
    ],
    "cpu": [
        Shape("last_scan", "forward", "float32", 1, 200),
        Shape("last_scan", "forward", "float32", 32, 50),
        Shape("last_scan", "forward", "float32", 32, 200, 32),
        Shape("spectral_projection", "forward", "float32", 32, 50, None),
        Shape("gated_fusion", "forward", "float32", 256, 1, None),
        # As one trains: a batch of 256 on rows of 50.
        Shape("filtered_last_scan", "training", "float32", 256, 50),
        Shape("cross_entropy", "training", "float32", 256, 1, None),
        Shape("embed_norm", "training", "float32", 256, 50, None),
        Shape("output_ffn", "training", "float32", 256, 1, None),
        Shape("causal_conv1d", "training", "float32", 256, 50, None),
        *(Shape("selective_scan", phase, "float32", 128, 50) for phase in PHASES),
    ],
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ops", nargs="+", choices=OPS, default=list(OPS), help="which ops (default: all)")
    add("--phase", nargs="+", choices=PHASES, default=list(PHASES), help="default: both")
    add("--dtype", nargs="+", choices=["float32", "bfloat16"], help="only shapes of these (default: all)")
    add("--batch", type=int, help="instead of each shape's own batch size")
    add("--seq-len", type=int, help="instead of each shape's own length")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--core", action="store_true", help="only the shapes for which targets are set")
    add("--eager-only", action="store_true", help="compile nothing")
    add("--autotune", action="store_true", help="compiled peers also with max-autotune: minutes more")
    add("--budget-seconds", type=float, default=75, help="rows not reached by then are skipped (default: 75)")
    add("--out", metavar="FILE", help="write the JSON here (default: a temporary folder)")
    add("--resume", action="store_true", help="keep the rows that --out holds, and measure what is missing")
    add("--record", action="store_true", help="write the JSON to bench/results")
    add("--plot", metavar="FILE", help="draw a PNG of the shares of the bounds")
    options = parser.parse_args(arguments)
    if options.resume and not options.out:
        parser.error("--resume: expected --out FILE, whose rows are kept")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    for name in ("batch", "seq_len"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    return options


def shapes(options: argparse.Namespace, device: torch.device) -> list[Shape]:
    """What was asked for, core shapes first; a shape that flags make equal to another counts once."""
    chosen = CORE[device.type] + ([] if options.core else REST[device.type])
    found: dict[Shape, None] = {}
    for shape in chosen:
        if shape.op not in options.ops or shape.phase not in options.phase:
            continue
        if options.dtype and shape.dtype not in options.dtype:
            continue
        batch = options.batch or shape.batch
        length = shape.seq_len if shape.op in LENGTHLESS else options.seq_len or shape.seq_len
        found[Shape(shape.op, shape.phase, shape.dtype, batch, length, shape.d_state)] = None
    return list(found)


def key(row: Row | dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows the same measurement."""
    values = row if isinstance(row, dict) else asdict(row)
    return tuple(values.get(name) for name in ("op", "phase", "impl", "mode", "dtype", "batch", "seq_len", "d_state"))


def document(device: torch.device, rows: Sequence[Row]) -> dict[str, Any]:
    """As `_results.document`, with the kernels' own name where git is not at hand."""
    whole = _results.document(device, [])
    whole["kernels_tree"] = tree_hash(_results.ROOT / "kernels")[:12]
    return {**whole, "script": "kernels", "rows": [asdict(row) for row in rows]}


def kept(path: Path, device: torch.device) -> list[Row]:
    """Rows of an earlier run with these kernels on this device; those that it did not reach are left out."""
    if not path.exists():
        return []
    old, new = json.loads(path.read_text()), document(device, [])
    if any(old.get(name) != new[name] for name in ("kernels_tree", "device", "torch", "triton")):
        return []
    return [Row(**row) for row in old["rows"] if _merge.is_final(row)]


def run(options: argparse.Namespace, device: torch.device, path: Path) -> Iterator[list[Row]]:
    """The rows of each shape as soon as it is measured, earlier ones among them; a later row replaces its like."""
    begun = time.perf_counter()
    rows = kept(path, device) if options.resume else []
    done = {key(row) for row in rows}
    yield rows
    chosen = shapes(options, device)
    todo = [(shape, False) for shape in chosen] + [(shape, True) for shape in chosen if shape.op in FOREIGN]
    ceilings: dict[str, _bounds.Ceilings] = {}
    for index, (shape, foreign) in enumerate(todo):
        elapsed = time.perf_counter() - begun
        share = (options.budget_seconds - elapsed) / (len(todo) - index)
        print(f"  {_name(shape)}{', other libraries' if foreign else ''} ...", file=sys.stderr, flush=True)
        torch._dynamo.reset()
        problem, failure = _problem(shape, device, options)
        if problem is None:
            yield [blank(shape, Peer("-", "-", skipped=failure), "")]
            if _failure.concerns(failure):
                _failure.end()
            continue
        peers = [peer for peer in problem.peers if _wanted(peer, options) and key(blank(shape, peer, "")) not in done]
        peers = [peer for peer in peers if peer.foreign == foreign]
        if elapsed > options.budget_seconds:
            missed = _blanks(shape, problem, peers)
            for row in missed:
                row.skipped = row.skipped or NOT_REACHED
            yield missed
            continue
        if not peers:
            continue
        if shape.dtype not in ceilings:
            ceilings[shape.dtype] = _bounds.measure_ceilings(device, shape.torch_dtype)
        stop = begun + COMPILE_SHARE * options.budget_seconds
        if foreign:
            yield [dataclasses.replace(row, skipped=row.skipped or ENDED) for row in _blanks(shape, problem, peers)]
        measured = measure(
            shape, problem, peers, device, ceilings[shape.dtype], max(LEAST_SECONDS, (1 - COMPILE_SHARE) * share), stop
        )
        yield measured
        if any(_failure.concerns(row.skipped) for row in measured):
            _failure.end()


def _blanks(shape: Shape, problem: Problem, peers: Sequence[Peer]) -> list[Row]:
    return [blank(shape, peer, problem.what) for peer in peers]


def _wanted(peer: Peer, options: argparse.Namespace) -> bool:
    return not (options.eager_only and peer.mode.startswith("compiled"))


def _problem(shape: Shape, device: torch.device, options: argparse.Namespace) -> tuple[Problem | None, str]:
    try:
        return importlib.import_module(f"bench.peers.{shape.op}").problem(shape, device, options.autotune), ""
    except Exception as error:  # out of memory, say: a row that says so, not the end of the run
        return None, _failure.told(error, device)


def _name(shape: Shape) -> str:
    states = "" if shape.d_state is None else f", N={shape.d_state}"
    length = "" if shape.op in LENGTHLESS else f", L={shape.seq_len}"
    return f"{shape.op} {shape.phase}, {shape.dtype}, B={shape.batch}{length}{states}"


def table(rows: Sequence[Row]) -> str:
    """A block for each shape: fastest first, and how many times as long as the fastest each one takes."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        shape = Shape(row.op, row.phase, row.dtype, row.batch, row.seq_len, row.d_state)
        groups.setdefault(f"{_name(shape)} ({row.what})", []).append(row)
    text: list[str] = []
    for name, own in groups.items():
        timed = sorted((row for row in own if row.median_ms), key=lambda row: row.median_ms or 0)
        text.append(name)
        if timed:
            lines = [["computed by", "mode", "ms", "(20-80 %)", "x fastest", "rel. err.", "bound"]]
            lines += [
                [
                    row.impl, row.mode, f"{row.median_ms:.4f}", f"{row.p20_ms:.4f}-{row.p80_ms:.4f}",
                    f"{(row.median_ms or 0) / (timed[0].median_ms or 1):.2f}", f"{row.rel_err:.1e}",
                    f"{row.bound_share:4.0%} of {row.bound}",
                ]
                for row in timed
            ]  # fmt: skip
            text += [f"  {line}" for line in _results.aligned(lines, left={0, 1, 6})]
        reasons: dict[str, list[str]] = {}
        for row in own:
            if row.skipped is not None:
                reasons.setdefault(row.skipped, []).append(f"{row.impl} {row.mode}")
        text += [f"  skipped: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        text.append("")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{_results.device_name(device)}; torch {torch.__version__}")
    path = _results.result_path("kernels", device, options.out, options.record)
    rows: dict[tuple[Any, ...], Row] = {}
    for more in run(options, device, path):
        rows |= {key(row): row for row in more}
        _results.write_json(path, document(device, list(rows.values())))
    print(table(list(rows.values())))
    if device.type == "cpu":
        print("Times on a CPU that does other work as well are good as ratios only.")
    print(f"rows: {path}")
    if options.plot:
        from bench import roofline

        roofline.draw([json.loads(path.read_text())], Path(options.plot))
        print(f"figure: {options.plot}")


if __name__ == "__main__":
    main()
