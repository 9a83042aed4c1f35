"""What the kernels and the model are meant to reach on an H200, and whether the rows of a run say that they do.

Every target is a ratio of two rows of the same run, or the share of a bound. What has no rows is not reached and not
missed: it is not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Row = Mapping[str, Any]
Rows = Mapping[str, Sequence[Row]]  # by script

LENGTHS = (50, 200, 800, 1600)


@dataclass(frozen=True)
class Result:
    """One target: what was found, None where the rows are not there."""

    what: str
    against: str
    wanted: str
    found: float | None
    reached: bool | None
    detail: str = ""


def is_ours(row: Row) -> bool:
    """Computed by this package's kernels or engine."""
    return str(row["impl"]).split(",")[0] in ("triton", "cpu")


def is_compiled_sasrec(row: Row) -> bool:
    return row["model"] == "sasrec" and "compiled" in row["mode"]


def fastest(rows: Iterable[Row], measure: str = "median_ms") -> Row | None:
    """The row with the smallest value; None where nothing was measured."""
    return min((row for row in rows if row.get(measure) is not None), key=lambda row: row[measure], default=None)


def evaluate(rows: Rows) -> list[Result]:
    """Every target, kernels first."""
    return [*_kernels(rows.get("kernels", ())), *_models(rows)]


def _ratio(
    what: str, against: str, wanted: float, ours: Row | None, peer: Row | None, measure: str = "median_ms"
) -> Result:
    """How many times the peer takes of what ours takes; `wanted` at least."""
    word = f"at least {wanted:g}x"
    if ours is None or peer is None:
        return Result(what, against, word, None, None)
    found = peer[measure] / ours[measure]
    detail = (
        f"{ours['impl']} {ours['mode']} {ours[measure]:.4g} against {peer['impl']} {peer['mode']} {peer[measure]:.4g}"
    )
    return Result(what, against, word, found, found >= wanted, detail)


def _cost(
    what: str, against: str, most: float, ours: Row | None, peer: Row | None, measure: str = "median_ms"
) -> Result:
    """What ours takes of what the peer takes; `most` at most."""
    one = _ratio(what, against, 1 / most, ours, peer, measure)
    return replace(one, wanted=f"at most {most:g}x", found=None if one.found is None else 1 / one.found)


def _share(what: str, wanted: float, ours: Row | None, resource: str) -> Result:
    word = f"at least {wanted:.0%} of {resource}"
    if ours is None or ours.get("bound_share") is None:
        return Result(what, "its bound", word, None, None)
    found = ours["bound_share"]
    detail = f"bounded by {ours['bound']}, {ours['bound_ms']:.4g} ms"
    return Result(what, "its bound", word, found, found >= wanted and ours["bound"] == resource, detail)


def _kernels(rows: Sequence[Row]) -> list[Result]:
    def pick(op: str, impl: str | Sequence[str], mode: str | None = None, **shape: Any) -> Row | None:
        names = (impl,) if isinstance(impl, str) else impl
        want = {"op": op, "phase": "forward", "dtype": "bfloat16", "seq_len": 200, "batch": 2048} | shape
        return fastest(
            row
            for row in rows
            if row["impl"] in names
            and (mode is None or row["mode"].split(",")[0] == mode)
            and all(row[name] == value for name, value in want.items())
        )

    found: list[Result] = []
    spectral = pick("spectral_projection", ("triton", "triton, transforms"))
    what = "spectral_projection, L=200, B=2048"
    found.append(_ratio(what, "torch.fft eager", 8, spectral, pick("spectral_projection", "torch.fft", "eager")))
    found.append(_ratio(what, "torch.fft compiled", 4, spectral, pick("spectral_projection", "torch.fft", "compiled")))
    found.append(_share(what, 0.75, spectral, "memory"))
    for phase, wanted in (("forward", 3.0), ("training", 2.0)):
        ours, theirs = (pick("selective_scan", name, phase=phase, d_state=16) for name in ("triton", "mamba_ssm"))
        found.append(_ratio(f"selective_scan {phase}, L=200, B=2048, N=16", "mamba-ssm", wanted, ours, theirs))
    everywhere = pick("last_state", "triton, all positions", d_state=16)
    for name, wanted in (("triton", 2.0), ("triton, nodes", 4.0)):
        last = pick("last_state", name, d_state=16)
        found.append(_ratio(f"last_state ({name}), L=200, B=2048", "own selective_scan", wanted, last, everywhere))
    exact = pick("last_state", "triton", d_state=16)
    found.append(_share("last_state, L=200, B=2048, N=16", 0.6, exact, "special functions"))
    for mode, wanted in (("eager", 5.0), ("compiled", 1.5)):
        shape: dict[str, Any] = {"batch": 4096, "seq_len": 1}
        pair = pick("gated_fusion", "triton", "eager", **shape), pick("gated_fusion", "torch", mode, **shape)
        found.append(_ratio("gated_fusion, B=4096", f"torch {mode}", wanted, *pair))
    folded = {n: pick("encode_last", ("triton", "triton, nodes"), batch=4096, d_state=n) for n in (16, 32)}
    for n in (16, 32):
        peer = pick("encode_last", "torch.fft + mamba_ssm", batch=4096, d_state=n)
        found.append(_ratio(f"encode_last, L=200, B=4096, N={n}", "torch.fft + mamba-ssm", 6, folded[n], peer))
    found.append(_cost("encode_last, L=200, B=4096, N=32: time", "N=16", 1.4, folded[32], folded[16]))
    return found


def _models(rows: Rows) -> list[Result]:
    def pick(script: str, accept: Callable[[Row], bool], measure: str = "median_ms", **shape: Any) -> Row | None:
        return fastest(
            (
                row
                for row in rows.get(script, ())
                if accept(row) and all(row.get(name) == value for name, value in shape.items())
            ),
            measure,
        )

    def m2rec(row: Row) -> bool:
        return row["model"] == "m2rec" and is_ours(row)

    found: list[Result] = []
    shape: dict[str, Any]
    compiled = "SASRec, compiled"
    for length, wanted in zip(LENGTHS, (1.0, 1.5, 3.0, 8.0), strict=True):
        shape = {"batch": 4096, "seq_len": length}
        pair = pick("throughput", m2rec, **shape), pick("throughput", is_compiled_sasrec, **shape)
        found.append(_ratio(f"throughput, L={length}, B=4096", compiled, wanted, *pair))
    for length in LENGTHS:
        shape = {"batch": 1, "seq_len": length}
        pair = pick("latency", m2rec, **shape), pick("latency", is_compiled_sasrec, **shape)
        found.append(_ratio(f"latency, L={length}, B=1", compiled, 1.0, *pair))
    shape = {"batch": 4096, "seq_len": 200}

    def published(row: Row) -> bool:
        return row["model"] == "sasrec" and row["impl"] == "as published" and row["mode"] == "eager"

    ours = pick("throughput", m2rec, **shape)
    found.append(
        _ratio(
            "throughput, L=200, B=4096", "SASRec, eager as published", 6, ours, pick("throughput", published, **shape)
        )
    )
    found.append(_share("throughput, L=200, B=4096", 0.6, ours, "special functions"))
    shape = {"batch": 2048, "seq_len": 200, "phase": "training"}

    def assembled(row: Row) -> bool:
        return row["model"] == "m2rec" and row["impl"] == "torch.fft + mamba_ssm"

    step = pick("train_step", m2rec, **shape)
    for name, accept, wanted in (
        (compiled, is_compiled_sasrec, 2.0),
        ("M2Rec on torch.fft + mamba-ssm", assembled, 4.0),
    ):
        found.append(_ratio("training step, L=200, B=2048", name, wanted, step, pick("train_step", accept, **shape)))
    peak = "peak_mem_mb"
    pair = (
        pick("memory", m2rec, peak, **shape),
        pick("memory", lambda row: row["model"] == "sasrec" and row.get("positions") == "last", peak, **shape),
    )
    found.append(_cost("peak memory of a training step, L=200, B=2048", "SASRec", 0.5, *pair, measure=peak))
    return found


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    lines = ["| what | against | target | found | |", "|---|---|---|---|---|"]
    for one in results:
        if one.found is None:
            value, word = "", "not measured"
        else:
            # Never rounded to the side of the target.
            rounded = math.ceil(one.found * 100) if "most" in one.wanted else math.floor(one.found * 100)
            value = f"{rounded} %" if "%" in one.wanted else f"{rounded / 100:.2f}x"
            word = ("reached" if one.reached else "MISSED") + (f": {one.detail}" if one.detail else "")
        lines.append(f"| {one.what} | {one.against} | {one.wanted} | {value} | {word} |")
    return "\n".join(lines)
