"""What /metrics tells Prometheus about the service."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The counters of one service, in a registry of their own.

    Args:
        queue_depth: histories that wait for the model now.
    """

    def __init__(self, queue_depth: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "fastm2rec_requests", "Answers; status 499: the client hung up.", ["path", "status"], registry=registry
        )
        self.latency = Histogram(
            "fastm2rec_request_seconds", "From a request's headers to the end of its answer.", ["path"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.batch_size = Histogram(
            "fastm2rec_batch_size", "Histories in a call of the model.", buckets=SIZES, registry=registry
        )
        self.model_seconds = Histogram(
            "fastm2rec_model_seconds", "A call of the model.", buckets=SECONDS, registry=registry
        )
        self.skipped = Counter("fastm2rec_skipped_items", "Unknown ids left out of histories.", registry=registry)
        self.fallbacks = Counter("fastm2rec_fallbacks", "Histories answered by popularity.", registry=registry)
        depth = Gauge("fastm2rec_queue_depth", "Histories that wait for the model.", registry=registry)
        depth.set_function(queue_depth)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class MetricsMiddleware:
    """Counts and times requests by path and status.

    Args:
        app: the application.
        metrics: where to.
        paths: the paths with a label of their own, so that strangers' paths do not fill the memory.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # of an application that fails before it answers
        start = time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.latency.labels(path).observe(time.perf_counter() - start)
