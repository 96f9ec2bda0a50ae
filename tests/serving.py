"""Servers on this machine for tests: our own, and one that misbehaves as it is told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from zaya_convert.runtime.engine import Engine
from zaya_convert.runtime.tokenizer import Tokenizer
from zaya_convert.serve.app import App
from zaya_convert.serve.asked import Reader
from zaya_convert.serve.server import Server, listen, url_of
from zaya_convert.serve.worker import Worker

NAME = "tiny"


@dataclass
class Served:
    """Our server, running in a thread of this process."""

    url: str
    worker: Worker
    tokenizer: Tokenizer


@contextmanager
def served(
    engine: Engine[Any],
    tokenizer: Tokenizer,
    *,
    batch: int = 16,
    waiting: int = 64,
    separate: bool = False,
    key: str = "",
) -> Iterator[Served]:
    """Serve an engine on a free port."""
    worker = Worker(engine, batch, waiting)
    reader = Reader(NAME, engine.config, tokenizer, separate, worker.capacity)
    ready = threading.Event()
    server = Server(App(worker, reader, key), ready.set)
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield Served(url_of(listener), worker, tokenizer)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


Reply = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Misbehaving:
    """A server that gives its replies in turn, the last one for ever.

    Attributes:
        bodies: of the chat requests that came.
        headers: theirs.
    """

    url: str
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def reply(status: int, body: str = "", kind: str = "application/json", **headers: str) -> Reply:
    """An ordinary reply."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body.encode())))
        handler.end_headers()
        handler.wfile.write(body.encode())

    return send


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Breaks the connection off without a word."""
    handler.connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
    )
    handler.connection.close()


@contextmanager
def misbehaving(replies: Sequence[Reply], models: Reply | None = None) -> Iterator[Misbehaving]:
    """Answer chat requests with ``replies``; ``models`` is the reply to GET."""
    left = list(replies)
    known = models or reply(200, '{"data": [{"id": "m", "owned_by": "somebody"}]}')
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            known(self)

        def do_POST(self) -> None:
            import json

            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                state.bodies.append(json.loads(body))
                state.headers.append(dict(self.headers))
                act = left.pop(0) if len(left) > 1 else left[0]
            self.close_connection = True
            act(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        state = Misbehaving(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
