"""Runs the application: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import gc
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .settings import Settings


class _Server(uvicorn.Server):
    """uvicorn, which announces itself, and lets the application know that it is about to end."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], object], on_exit: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_started = on_started
        self._on_exit = on_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_exit()
        super().handle_exit(sig, frame)


def serve(app: FastAPI, settings: Settings, host: str, port: int, announce: Callable[[str], object]) -> None:
    """Serve until SIGTERM or Ctrl-C; then answer what is waiting, refuse what comes, and return.

    Args:
        app: what `create_app` made.
        settings: the same settings.
        host: the interface to listen on.
        port: 0 takes any free port.
        announce: called with the service's address when it accepts connections.

    Raises:
        OSError: the address cannot be bound.
    """
    listener = _bind(host, port)
    # What is there now stays. Walking through all of it again and again would hold up requests for a long moment.
    gc.collect()
    gc.freeze()
    bound_host, bound_port = listener.getsockname()[:2]
    address = f"http://[{bound_host}]:{bound_port}" if ":" in bound_host else f"http://{bound_host}:{bound_port}"
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=settings.drain_seconds,
    )
    server = _Server(config, lambda: announce(address), app.state.batcher.refuse)
    # uvicorn raises the signal that ended it once more, for whoever handled it before. An orderly end is no failure.
    previous = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
    return listener
