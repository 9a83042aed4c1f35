"""The HTTP service: requests come in one by one, the model answers them in batches.

    body_limit -> app (schemas, catalogue) -> batching -> a thread with the model

`create_app` makes the ASGI application, `server.serve` runs it. This package needs the extra `serve`.
"""

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'the service needs {error.name}, which is not installed: pip install "fastm2rec[serve]"', name=error.name
    ) from error

from .app import create_app
from .settings import Settings

__all__ = ["Settings", "create_app"]
