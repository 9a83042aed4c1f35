"""`fastm2rec recommend`: the best next items for histories."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import IO

from ._arguments import PROGRAM, positive


def run(arguments: list[str]) -> int:
    from ..base import SequentialRecommender

    parser = argparse.ArgumentParser(
        f"{PROGRAM} recommend",
        description="The best next items for item histories, oldest item first, by the catalogue's own ids.",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a run's folder, or a folder that save_pretrained wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--history", nargs="+", metavar="ITEM", help="one history")
    source.add_argument("--file", metavar="FILE", help="a history a line, ids between spaces; - for standard input")
    add("-k", type=positive, default=10, help="how many items (default: 10)")
    add("--include-seen", action="store_true", help="also recommend items of the history")
    add("--skip-unknown", action="store_true", help="leave out ids that are not in the catalogue")
    add("--batch-size", type=positive, default=256, help="histories scored at once (default: 256)")
    add("--json", action="store_true", help="print one JSON list a history")
    options = parser.parse_args(arguments)

    best = options.model / "best"
    model = SequentialRecommender.from_pretrained(best if best.is_dir() else options.model)
    lines = [options.history] if options.history else _read_histories(options.file)
    whole = model.vocab is None or model.vocab.kind is int
    histories = [[_as_id(item, whole) for item in line] for line in lines]
    answers = model.recommend(
        histories,
        options.k,
        exclude_seen=not options.include_seen,
        unknown="skip" if options.skip_unknown else "error",
        batch_size=options.batch_size,
    )

    def title(item: int | str) -> str | None:
        return None if model.vocab is None else model.vocab.title(item)

    for place, answer in enumerate(answers):
        if options.json:
            print(json.dumps([{"item": item, "score": score, "title": title(item)} for item, score in answer]))
            continue
        if len(answers) > 1:
            print(f"{'' if place == 0 else chr(10)}history {place + 1}: {' '.join(map(str, histories[place][-8:]))}")
        width = max((len(str(item)) for item, _ in answer), default=0)
        for rank, (item, score) in enumerate(answer, start=1):
            print(f"{rank:3}  {item!s:>{width}}  {score:9.4f}  {title(item) or ''}".rstrip())
    return 0


def _read_histories(name: str) -> list[list[str]]:
    """The histories in a file; blank lines are passed over."""

    def split(file: IO[str]) -> list[list[str]]:
        return [line.split() for line in file if line.strip()]

    if name == "-":
        return split(sys.stdin)
    with Path(name).open(encoding="utf-8") as file:
        return split(file)


def _as_id(text: str, whole: bool) -> int | str:
    """An id as the catalogue has it; what is no number stays a string, for the error about it."""
    return int(text) if whole and text.lstrip("-").isdecimal() else text
