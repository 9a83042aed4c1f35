"""The words that every script takes, and what they are where they are not given.

A CPU and a GPU are asked for different sizes by default: each for what it is used for, within the time budget.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import torch

from ._registry import MODELS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Sizes = Mapping[str, Sequence[int]]  # by the type of the device


def parser(description: str | None, *, seq_len: Sizes, batch: Sizes, budget: float = 60) -> argparse.ArgumentParser:
    """The parser of one script; `parse` reads the command line with it.

    Args:
        description: the script's docstring.
        seq_len, batch: what is measured by default, on "cpu" and on "cuda".
        budget: seconds after which nothing new is begun, by default.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--seq-len", type=positive, nargs="+", help=f"items of history (default: {_shown(seq_len)})")
    add("--batch", type=positive, nargs="+", help=f"sequences at once (default: {_shown(batch)})")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which models (default: all)")
    add("--impls", nargs="+", metavar="IMPL", help="only what is computed by these, as the table calls them")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"], help="default: float32 bfloat16")
    add("--d-state", type=positive, default=16, help="N of the scan (default: 16)")
    add("--n-items", type=positive, default=3706, help="size of the catalogue (default: 3706, as in ML-1M)")
    add("--eager-only", action="store_true", help="compile nothing, capture no CUDA graph")
    add("--leave-out", nargs="+", metavar="ROW", help="rows that would lose the GPU, as bench/run_all.py calls them")
    add(
        "--quick",
        action="store_true",
        help="torch.compile without its search: on CUDA seconds for a model, not minutes",
    )
    add("--compile", nargs="+", metavar="IMPL", help="compile only what is computed by these (default: all)")
    add("--budget-seconds", type=float, default=budget, help=f"begin nothing new after this (default: {budget:g})")
    add(
        "--limit-seconds", type=float, metavar="S", help="compile nothing that may end after this (default: the budget)"
    )
    add("--out", metavar="FILE", help="write the JSON here (default: a temporary folder)")
    add("--record", action="store_true", help="write the JSON to bench/results")
    add("--plot", metavar="FILE", help="draw a PNG")
    made.set_defaults(sizes_by_device={"seq_len": seq_len, "batch": batch})
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, complete: `device` is "cpu" or "cuda", and sizes that were not given are the device's."""
    options = made.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: this torch sees no CUDA device")
    if options.out is not None and options.record:
        made.error("--record: expected no --out beside it, since a record has its own place")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, sizes in options.sizes_by_device.items():
        if getattr(options, name) is None:
            setattr(options, name, list(sizes[options.device]))
    return options


def positive(text: str) -> int:
    """A whole number of at least 1, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _shown(sizes: Sizes) -> str:
    return "; ".join(f"{' '.join(map(str, values))} on {device}" for device, values in sizes.items())
