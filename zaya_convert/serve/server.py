"""Listening, and stopping when told to."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from zaya_convert.errors import OutputError, UsageError
from zaya_convert.serve.app import App

_GRACE_SECONDS = 10  # for requests that run when the server is told to stop


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections.

    Args:
        port: 0 for any that is free.

    Raises:
        UsageError: no such host.
        OutputError: the port is taken, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OutputError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves an application until it is told to stop, by a signal or by ``should_exit``.

    Args:
        ready: called once it serves.
    """

    def __init__(self, app: App, ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app.asgi, http="h11", ws="none", loop="asyncio", lifespan="on", log_level="error",
                access_log=False, server_header=False, timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )  # fmt: skip
        self._ready = ready

    async def startup(self, *args: Any, **options: Any) -> None:
        """Start to serve, and tell so."""
        await super().startup(*args, **options)
        if self.started:
            self._ready()
