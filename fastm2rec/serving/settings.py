"""What can be set about the service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """How the service batches, what it accepts, and what it answers where a history is not quite right.

    Args:
        max_batch: histories that the model is given at once.
        window_ms: how long the oldest of several waiting requests waits for more of them.
        queue: histories that wait for the model; a request that finds no room is answered 503.
        max_body: bytes of a request's body; a longer one is answered 413.
        unknown: "skip" leaves out and counts ids that the catalogue does not hold, "error" refuses the request.
        empty: "popular" answers a history without known items with the most popular ones, "error" refuses it.
        titles: give the items' titles in answers.
        threads: threads that the model computes with; None leaves it to torch.
        drain_seconds: on shutdown, how long connections may take to end before they are cut.

    Raises:
        ValueError: a value out of range.
    """

    max_batch: int = 64
    window_ms: float = 2.0
    queue: int = 1024
    max_body: int = 1 << 20
    unknown: Literal["error", "skip"] = "skip"
    empty: Literal["error", "popular"] = "error"
    titles: bool = True
    threads: int | None = None
    drain_seconds: int = 30

    def __post_init__(self) -> None:
        for name in ("max_batch", "queue", "max_body", "threads", "drain_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 <= self.window_ms <= 1000:
            raise ValueError(f"window_ms: expected 0 to 1000, got {self.window_ms}")
        for name, words in (("unknown", ("error", "skip")), ("empty", ("error", "popular"))):
            if getattr(self, name) not in words:
                raise ValueError(f"{name}: expected one of {', '.join(words)}, got {getattr(self, name)!r}")
