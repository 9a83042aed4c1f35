"""`fastm2rec serve`: recommendations over HTTP."""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ._arguments import PROGRAM, positive

if TYPE_CHECKING:
    from ..recommender import Recommender
    from ..serving import Settings

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def run(arguments: list[str]) -> int:
    from ..recommender import Recommender
    from ..serving import Settings, create_app
    from ..serving.server import serve

    options = _parser(Settings()).parse_args(arguments)
    settings = Settings(
        max_batch=options.max_batch,
        window_ms=options.window_ms,
        queue=options.queue,
        max_body=options.max_body,
        unknown=options.unknown,
        empty=options.empty,
        titles=options.titles,
        threads=options.threads,
        drain_seconds=options.drain_seconds,
    )
    best = options.model / "best"
    folder = best if best.is_dir() else options.model
    recommender = Recommender.from_pretrained(folder, impl=options.impl)
    _warm_up(recommender, settings)
    model = f"{folder.resolve().name if folder != best else options.model.resolve().name}@{_digest(folder)}"
    app = create_app(recommender, settings, model)

    def announce(address: str) -> None:
        print(
            f"{address}  {model}: {recommender.n_items:,} items, the last {recommender.max_len} of a history count, "
            f"computed by {recommender.impl}; unknown ids: {settings.unknown}, empty histories: {settings.empty}",
            flush=True,
        )

    serve(app, settings, options.host, options.port, announce)
    return 0


def _parser(default: Settings) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"{PROGRAM} serve",
        description="Answer POST /recommend, and show a page at /. Stops on Ctrl-C or SIGTERM when it has answered "
        "what was waiting.",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="a run's folder, or one that save_pretrained wrote")
    add("--impl", default="auto", help="which implementation computes (default: auto)")
    add("--host", default="127.0.0.1", help="the interface to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=_port, default=8000, help="0 takes any free port (default: 8000)")
    add(
        "--max-batch",
        type=positive,
        default=default.max_batch,
        metavar="N",
        help=f"histories that the model gets at once (default: {default.max_batch})",
    )
    add(
        "--window-ms",
        type=float,
        default=default.window_ms,
        metavar="MS",
        help=f"under load, how long a request waits for others to share its batch (default: {default.window_ms:g})",
    )
    add(
        "--queue",
        type=positive,
        default=default.queue,
        metavar="N",
        help=f"histories that may wait; beyond, 503 (default: {default.queue})",
    )
    add(
        "--max-body",
        type=_size,
        default=default.max_body,
        metavar="SIZE",
        help="longest request, as 500KiB or 1MiB; beyond, 413 (default: 1MiB)",
    )
    add(
        "--unknown",
        choices=["skip", "error"],
        default=default.unknown,
        help=f"ids that the catalogue does not hold: leave out and count, or refuse (default: {default.unknown})",
    )
    add(
        "--empty",
        choices=["popular", "error"],
        default=default.empty,
        help=f"histories without a known item: the most popular items, or refuse (default: {default.empty})",
    )
    add("--threads", type=positive, default=None, metavar="N", help="threads that compute (default: torch's choice)")
    add(
        "--titles",
        action=argparse.BooleanOptionalAction,
        default=default.titles,
        help="give titles in answers where the catalogue has them (default: yes)",
    )
    add(
        "--drain-seconds",
        type=positive,
        default=default.drain_seconds,
        metavar="S",
        help=f"how long a shutdown waits for slow clients (default: {default.drain_seconds})",
    )
    return parser  # fmt: skip


def _warm_up(recommender: Recommender, settings: Settings) -> None:
    """Compile what is compiled on first use, and find out now whether the settings suit the model."""
    item = 1 if recommender.vocab is None else recommender.vocab.items[0]
    for rows in (1, settings.max_batch):
        recommender.recommend([[item] * recommender.max_len] * rows, 1, exclude_seen=False)
    if settings.empty == "popular":
        recommender.recommend([[]], 1, empty="popular")


def _digest(folder: Path) -> str:
    """A name for the weights: equal files, equal names."""
    from ..base import TENSORS_FILE

    with (folder / TENSORS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 500KiB or 1MiB, got {text!r}")
    return int(found[1]) * UNITS[found[2].upper()]
