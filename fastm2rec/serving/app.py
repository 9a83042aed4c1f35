"""The ASGI application: routes, statuses, and the way from a request to a batch and back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, Literal, Protocol

import torch
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from .._version import __version__
from ..base import Recommendation
from ..vocab import ItemId, Vocabulary
from .batching import Batcher, ClosingError, ComputeError, QueueFullError
from .catalogue import Catalogue, HistoryError
from .metrics import Metrics, MetricsMiddleware
from .requests import ClientGoneError, read_body, unless_gone
from .schemas import ItemsResponse, Problem, RecommendRequest, RecommendResponse, explain
from .settings import Settings

PATHS = frozenset(
    {"/", "/recommend", "/items", "/healthz", "/healthz/live", "/healthz/ready", "/metrics", "/openapi.json"}
)
# The page is one file: it may load nothing, and talk to nobody but this service.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
RETRY_AFTER = {"Retry-After": "1"}
CLIENT_GONE = 499  # nginx's number; nobody reads it but the metrics

log = logging.getLogger(__name__)


class Answer(Protocol):
    """`fastm2rec.recommender.Recommendations`: the answer to one history."""

    @property
    def items(self) -> Sequence[Recommendation]: ...
    @property
    def skipped(self) -> int: ...
    @property
    def fallback(self) -> bool: ...


class Recommends(Protocol):
    """What the service needs of a `fastm2rec.Recommender`."""

    @property
    def vocab(self) -> Vocabulary | None: ...
    @property
    def n_items(self) -> int: ...

    def recommend(
        self,
        histories: Sequence[Sequence[ItemId]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        unknown: Literal["error", "skip"] = "error",
        empty: Literal["error", "popular"] = "error",
    ) -> Sequence[Answer]: ...


Options = tuple[int, bool]  # k, exclude_seen: requests that agree on these may share a batch


def create_app(recommender: Recommends, settings: Settings | None = None, model: str = "unnamed") -> FastAPI:
    """The application around a recommender; `app.state.batcher` is its queue.

    Args:
        recommender: a `fastm2rec.Recommender`. It is called in one thread.
        settings: see `Settings`.
        model: what answers name as their origin.
    """
    settings = settings or Settings()
    catalogue = Catalogue(recommender.vocab, recommender.n_items)
    metrics = Metrics(lambda: batcher.depth)

    def compute(options: Options, histories: list[list[ItemId]]) -> Sequence[Answer]:
        k, exclude_seen = options
        with metrics.model_seconds.time(), torch.inference_mode():
            return recommender.recommend(
                histories, k, exclude_seen=exclude_seen, unknown=settings.unknown, empty=settings.empty
            )

    def set_threads() -> None:  # in the thread that computes: torch counts threads for each thread apart
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)

    batcher: Batcher[Options, list[ItemId], Answer] = Batcher(
        compute,
        max_batch=settings.max_batch,
        window=settings.window_ms / 1e3,
        capacity=settings.queue,
        on_batch=metrics.batch_size.observe,
        on_thread_start=set_threads,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await batcher.close()

    # No /docs: FastAPI's page loads its scripts from elsewhere.
    app = FastAPI(title="fastm2rec", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.batcher = batcher
    app.add_middleware(MetricsMiddleware, metrics=metrics, paths=PATHS)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        fault = error.errors()[0]
        return JSONResponse({"detail": f"{fault['loc'][-1]}: {fault['msg']}"}, 422)

    @app.post(
        "/recommend",
        response_model=RecommendResponse,
        responses={status: {"model": Problem} for status in (400, 413, 422, 500, 503)},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": RecommendRequest.model_json_schema()}},
            }
        },
    )
    async def recommend(request: Request) -> Response:
        """The best next items for each history."""
        try:
            # Not a parameter of FastAPI's: pydantic's own parser checks while it reads, and takes no deep nesting.
            asked = RecommendRequest.model_validate_json(await read_body(request, settings.max_body))
            rows = asked.rows
            _check(asked, rows)
            answers = await unless_gone(request, batcher.submit((asked.k, asked.exclude_seen), rows))
        except ValidationError as error:
            status, detail = explain(error)
            raise HTTPException(status, detail) from None
        except HistoryError as error:
            raise HTTPException(422, str(error)[:500]) from None
        except (QueueFullError, ClosingError) as error:
            raise HTTPException(503, f"{error}; try again", RETRY_AFTER) from None
        except ComputeError as error:
            log.exception("the model failed")
            raise HTTPException(500, f"the model failed: {str(error)[:500]}") from None
        except (ClientDisconnect, ClientGoneError):
            return Response(status_code=CLIENT_GONE)
        except asyncio.CancelledError:  # uvicorn cuts off what a shutdown has waited for long enough
            if not batcher.closing:
                raise
            raise HTTPException(503, "the service has shut down", RETRY_AFTER) from None
        metrics.skipped.inc(sum(answer.skipped for answer in answers))
        metrics.fallbacks.inc(sum(answer.fallback for answer in answers))
        return JSONResponse({"model": model, "results": [_result(answer) for answer in answers]})

    def _check(asked: RecommendRequest, rows: list[list[ItemId]]) -> None:
        """What the model would refuse is refused before it shares a batch with other requests."""
        if asked.k > recommender.n_items:
            raise HTTPException(422, f"k: expected 1 to {recommender.n_items}, the catalogue's size, got {asked.k}")
        if len(rows) > settings.queue:
            raise HTTPException(422, f"histories: expected at most {settings.queue} in a request, got {len(rows)}")
        for place, history in enumerate(rows):
            name = "history" if asked.history is not None else f"histories[{place}]"
            catalogue.check(history, name, settings.unknown, settings.empty)

    def _result(answer: Answer) -> dict[str, Any]:
        items: list[dict[str, Any]] = [{"item": item, "score": score} for item, score in answer.items]
        if settings.titles and catalogue.has_titles:
            for entry in items:
                entry["title"] = catalogue.title(entry["item"])
        return {"items": items, "skipped": answer.skipped, "fallback": answer.fallback}

    @app.get("/items", response_model=ItemsResponse)
    async def items(
        query: Annotated[str, Query(max_length=200)] = "", limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> Response:
        """Items of the catalogue by id or title."""
        return JSONResponse({"items": await asyncio.to_thread(catalogue.search, query, limit)})

    @app.get("/healthz/live")
    async def live() -> dict[str, str]:
        """Does the process answer?"""
        return {"status": "live"}

    @app.get("/healthz")
    @app.get("/healthz/ready")
    async def ready() -> Response:
        """May requests be sent here? Not while the service shuts down."""
        is_ready = not batcher.closing
        return JSONResponse(
            {"status": "ready" if is_ready else "shutting down", "model": model, "items": recommender.n_items},
            200 if is_ready else 503,
        )

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    return app
