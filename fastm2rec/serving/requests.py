"""Reading a request: not more of it than is allowed, and not for longer than somebody waits for the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import HTTPException, Request

Result = TypeVar("Result")

# A client that is cut off while it sends may never see the answer; so much beyond the limit is read and thrown away.
LINGER = 16 << 20


class ClientGoneError(Exception):
    """The client hung up before it had an answer."""


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body, of `limit` bytes at most, whether its length was declared or not.

    (FastAPI's own `max_body_size` is younger than the releases that this package takes.)

    Raises:
        HTTPException: 413, a longer body.
        starlette.requests.ClientDisconnect: the client hung up.
    """
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    parts = []
    if size <= limit + LINGER:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > limit + LINGER:
                break
    if size > limit:
        raise HTTPException(413, f"the body is longer than {limit:,} bytes", {"Connection": "close"})
    return b"".join(parts)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled if the client hangs up. The request's body must have been read.

    Raises:
        ClientGoneError: the client hung up.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait((task,))  # its work is out of the queue before anything else happens
        raise ClientGoneError
    finally:
        task.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
