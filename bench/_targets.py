"""What the kernels and the model are meant to reach on an H200, and whether the rows of a run say that they do.

Every target is a ratio of two rows of the same run and dtype, or the share of a bound. What has no rows is not reached
and not missed: it is not measured. SASRec is the fastest of its rows, whatever computes it and in whatever mode; while
its compiled form has no time, a target against it may be missed but not reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench._modes import NO_SEARCH

Row = Mapping[str, Any]
Rows = Mapping[str, Sequence[Row]]  # by script

LENGTHS = (50, 200, 800, 1600)
SASREC = "SASRec at its best"


@dataclass(frozen=True)
class Result:
    """One target: what was found, None where the rows are not there, and `reached`, None where that is open."""

    what: str
    against: str
    wanted: str
    found: float | None
    reached: bool | None
    detail: str = ""


def is_ours(row: Row) -> bool:
    """Computed by this package's kernels or engine."""
    return str(row["impl"]).split(",")[0] in ("triton", "cpu")


def is_sasrec(row: Row) -> bool:
    return row["model"] == "sasrec"


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


def _against_sasrec(
    what: str, wanted: float, ours: Row | None, rows: Sequence[Row], measure: str = "median_ms"
) -> Result:
    """`_ratio` to the fastest of SASRec's `rows`; it says whether those had their best chance."""
    one = _ratio(what, SASREC, wanted, ours, fastest(rows, measure), measure)
    if one.found is None:
        return one
    modes = {row["mode"] for row in rows if row.get(measure) is not None and "compiled" in row["mode"]}
    if not modes:
        note = "its compiled form has no time"
        return replace(one, reached=None if one.reached else False, detail=f"{one.detail}; {note}")
    return one if modes != {NO_SEARCH} else replace(one, detail=f"{one.detail}; compiled without a search")


def _cost(
    what: str, against: str, most: float, ours: Row | None, peer: Row | None, measure: str = "median_ms"
) -> Result:
    """What ours takes of what the peer takes; `most` at most."""
    return _turned(_ratio(what, against, 1 / most, ours, peer, measure), most)


def _turned(one: Result, most: float) -> Result:
    """A ratio the other way round."""
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
    def all_of(script: str, accept: Callable[[Row], bool], **shape: Any) -> list[Row]:
        return [
            row
            for row in rows.get(script, ())
            if accept(row) and all(row.get(name) == value for name, value in shape.items())
        ]

    def pick(script: str, accept: Callable[[Row], bool], measure: str = "median_ms", **shape: Any) -> Row | None:
        return fastest(all_of(script, accept, **shape), measure)

    def like(ours: Row | None, shape: dict[str, Any]) -> dict[str, Any]:
        """The shape, in the dtype of our row."""
        return shape if ours is None else {**shape, "dtype": ours.get("dtype")}

    def m2rec(row: Row) -> bool:
        return row["model"] == "m2rec" and is_ours(row)

    found: list[Result] = []
    shape: dict[str, Any]
    for script, batch, ratios in (("throughput", 4096, (1.0, 1.5, 3.0, 8.0)), ("latency", 1, (1.0, 1.0, 1.0, 1.0))):
        for length, wanted in zip(LENGTHS, ratios, strict=True):
            shape = {"batch": batch, "seq_len": length}
            ours = pick(script, m2rec, **shape)
            theirs = all_of(script, is_sasrec, **like(ours, shape))
            found.append(_against_sasrec(f"{script}, L={length}, B={batch}", wanted, ours, theirs))
    shape = {"batch": 4096, "seq_len": 200}

    def published(row: Row) -> bool:
        return row["model"] == "sasrec" and row["impl"] == "as published" and row["mode"] == "eager"

    ours = pick("throughput", m2rec, **shape)
    peer = pick("throughput", published, **like(ours, shape))
    found.append(_ratio("throughput, L=200, B=4096", "SASRec, eager as published", 6, ours, peer))
    found.append(_share("throughput, L=200, B=4096", 0.6, ours, "special functions"))
    shape = {"batch": 2048, "seq_len": 200, "phase": "training"}

    def assembled(row: Row) -> bool:
        return row["model"] == "m2rec" and row["impl"] == "torch.fft + mamba_ssm"

    what = "training step, L=200, B=2048"
    ours = pick("train_step", m2rec, **shape)
    found.append(_against_sasrec(what, 2, ours, all_of("train_step", is_sasrec, **like(ours, shape))))
    peer = pick("train_step", assembled, **like(ours, shape))
    found.append(_ratio(what, "M2Rec on torch.fft + mamba-ssm", 4, ours, peer))
    ours = pick("memory", m2rec, "peak_mem_mb", **shape)
    theirs = all_of("memory", is_sasrec, positions="last", **like(ours, shape))
    one = _against_sasrec(f"peak memory of a {what}", 2, ours, theirs, "peak_mem_mb")
    found.append(_turned(one, 0.5))
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
            word = {True: "reached", False: "MISSED", None: "open"}[one.reached]
            word += f": {one.detail}" if one.detail else ""
        lines.append(f"| {one.what} | {one.against} | {one.wanted} | {value} | {word} |")
    return "\n".join(lines)
