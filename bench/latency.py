"""Latency of next-item inference: item ids in, the ten best items of the catalogue out.

    python bench/latency.py --seq-len 200
    python bench/latency.py --seq-len 50 200 800 --batch 1 32 256 --plot latency.png --budget-seconds 600

M2Rec, Mamba4Rec, SASRec and BERT4Rec, eager and compiled, on the device at hand. Every implementation is checked
against its reference on the same inputs before it is timed; all of one shape are timed in turn, round after round.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # from a clone, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench import _bounds, _plot, _results, _timing
from bench._registry import MODELS, Case, Sizes, cases

# A query may differ from the float32 reference by so much, relative to its norm; bfloat16 keeps 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INPUTS = 4  # batches that are rotated
COMPILE_SHARE = 0.8  # of the budget, after which nothing more is compiled


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seq-len", type=_positive, nargs="+", default=[200], help="items of history (default: 200)")
    add("--batch", type=_positive, nargs="+", default=[1, 32], help="sequences at once (default: 1 32)")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which models (default: all)")
    add("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is one")
    add("--dtype", nargs="+", choices=list(DTYPES), default=["float32"], help="default: float32")
    add("--d-state", type=_positive, default=16, help="N of the scan (default: 16)")
    add("--n-items", type=_positive, default=3706, help="size of the catalogue (default: 3706, as in ML-1M)")
    add("--topk", type=_positive, default=10, help="items out (default: 10)")
    add("--eager-only", action="store_true", help="compile nothing")
    add("--budget-seconds", type=float, default=60, help="rows not reached by then are skipped (default: 60)")
    add("--out", metavar="FILE", help="write the JSON here (default: a temporary folder)")
    add("--record", action="store_true", help="write the JSON to bench/results")
    add("--plot", metavar="FILE", help="draw a PNG")
    options = parser.parse_args(arguments)
    if options.topk > options.n_items:
        parser.error(f"--topk: expected at most --n-items={options.n_items}, got {options.topk}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def batches(batch: int, seqlen: int, sizes: Sizes) -> list[tuple[Tensor, Tensor]]:
    """Full rows of random items: the worst case of a length, and the same work for every model."""
    generator = torch.Generator().manual_seed(seqlen * 1009 + batch)
    shape = (batch, seqlen)
    return [
        (
            torch.randint(1, sizes.n_items + 1, shape, generator=generator).to(sizes.device),
            torch.full((batch,), seqlen, device=sizes.device),
        )
        for _ in range(INPUTS)
    ]


def error_of(case: Case, inputs: tuple[Tensor, Tensor]) -> float:
    """The largest difference of a query from its reference, relative to the reference's largest value."""
    assert case.encode is not None
    assert case.check is not None
    expected = case.check(*inputs).double()
    return float((case.encode(*inputs).cpu().double() - expected).abs().max() / expected.abs().max())


def measure(
    made: Sequence[Case], batch: int, seqlen: int, sizes: Sizes, ceilings: _bounds.Ceilings, seconds: float, stop: float
) -> list[_results.Row]:
    """Check and time the cases of one shape; `stop` is the time after which nothing more is compiled."""
    inputs = batches(batch, seqlen, sizes)
    rows: list[_results.Row] = []
    ready: list[tuple[_results.Row, Callable[[int], object]]] = []
    for case in made:
        d_state = getattr(case.config, "d_state", None)
        row = _results.Row(
            case.model, case.impl, case.mode, str(sizes.dtype).removeprefix("torch."), batch, seqlen, d_state,
            sizes.n_items, skipped=case.skipped,
        )  # fmt: skip
        rows.append(row)
        if case.skipped is not None:
            continue
        if case.mode == "compiled" and time.perf_counter() > stop:
            row.skipped = "the time budget ran out before it was compiled (--budget-seconds)"
            continue
        try:
            row.max_rel_err = error_of(case, inputs[0])
        except Exception as error:  # a compiler that fails is a row that says so, not the end of the run
            row.skipped = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        if not row.max_rel_err <= TOLERANCE[sizes.dtype]:
            row.skipped = f"wrong: differs from its reference by {row.max_rel_err:.1e}"
            continue
        run = case.top(sizes.topk)

        def call(turn: int, run: Callable[..., object] = run) -> object:
            return run(*inputs[turn % INPUTS])

        row.peak_mem_mb = _timing.peak_memory_mb(call, sizes.device)
        row.bound, row.bound_ms = ceilings.bound(_bounds.work(case.config, batch, seqlen, sizes.dtype.itemsize))
        ready.append((row, call))
    timings = _timing.interleave([call for _, call in ready], sizes.device, seconds) if ready else []
    for (row, _), timing in zip(ready, timings, strict=True):
        row.median_ms, row.p20_ms, row.p80_ms = timing.median_ms, timing.p20_ms, timing.p80_ms
        row.sequences_per_s = batch / timing.median_ms * 1e3
        assert row.bound_ms is not None
        row.bound_share = row.bound_ms / timing.median_ms
    return rows


@torch.inference_mode()
def run(options: argparse.Namespace) -> list[_results.Row]:
    """Measure everything that was asked for."""
    start = time.perf_counter()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[_results.Row] = []
    shapes = [(d, s, b) for d in options.dtype for s in options.seq_len for b in options.batch]
    left = len(shapes)
    for dtype in options.dtype:
        sizes = Sizes(options.n_items, options.d_state, options.topk, DTYPES[dtype], device)
        ceilings = _bounds.measure_ceilings(device, sizes.dtype)
        for seqlen in options.seq_len:
            torch.manual_seed(0)
            made = cases(tuple(options.models), seqlen, sizes)
            if options.eager_only:
                made = [case for case in made if case.mode == "eager"]
            for batch in options.batch:
                now = time.perf_counter() - start
                share = max(0.0, options.budget_seconds - now) / left
                seconds = (1 - COMPILE_SHARE) * share
                stop = start + now + COMPILE_SHARE * share
                print(f"  {dtype}, length {seqlen}, batch {batch} ...", file=sys.stderr, flush=True)
                rows += measure(made, batch, seqlen, sizes, ceilings, seconds, stop)
                left -= 1
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = _results.device_name(device)
    print(
        f"{name}; torch {torch.__version__}; {options.n_items:,} items, N={options.d_state}, {', '.join(options.dtype)}"
    )
    rows = run(options)
    print(_results.table(rows))
    if device.type == "cpu":
        print("Times on a CPU that does other work as well are good as ratios only.")
    path = _results.result_path("latency", device, options.out, options.record)
    _results.write_json(path, _results.document(device, rows))
    print(f"rows: {path}")
    if options.plot:
        title = (
            f"ids in, top {options.topk} of {options.n_items:,} items out; {', '.join(options.dtype)}; "
            f"{name}, torch {torch.__version__}"
        )
        _plot.latency(Path(options.plot), rows, title)
        print(f"figure: {options.plot}")


if __name__ == "__main__":
    main()
