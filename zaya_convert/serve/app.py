"""The routes: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models`` and ``/health``."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from torch import Tensor

from zaya_convert.errors import ZayaConvertError
from zaya_convert.runtime.generate import Step
from zaya_convert.serve.answered import Part, Shapes, Token
from zaya_convert.serve.asked import Asked, Reader
from zaya_convert.serve.errors import ApiError
from zaya_convert.serve.text import Splitter, Writer
from zaya_convert.serve.worker import Full, Job, Stopped, Worker

_BODY_BYTES = 16 << 20

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class App:
    """A worker and what reads its requests, as an ASGI application.

    Args:
        key: the bearer token that requests have to bring, "" for none.
    """

    def __init__(self, worker: Worker, reader: Reader, key: str = "") -> None:
        self._worker, self._reader, self._key = worker, reader, key
        self._started = int(time.time())
        completions = [
            Route(path, self._guarded(partial(self._complete, chat=chat)), methods=["POST"])
            for path, chat in (("/v1/chat/completions", True), ("/v1/completions", False))
        ]
        self.asgi = Starlette(
            routes=[
                *completions,
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{name:path}", self._guarded(self._model)),
                Route("/health", self._health),
            ],
            exception_handlers={
                ApiError: _refused,
                HTTPException: _refused,
                ClientDisconnect: _gone,
                Exception: _failed,
            },
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._worker.start()
        yield
        await run_in_threadpool(self._worker.stop)

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Handler:
        """The handler, for those who bring the key."""

        async def guarded(request: Request) -> Response:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self._key.encode())
            if self._key and not (right and scheme.lower() == "bearer"):
                raise ApiError(401, "wrong or missing API key", code="invalid_api_key")
            return await handler(request)

        return guarded

    async def _health(self, _: Request) -> Response:
        running, waiting = self._worker.counts
        status = {"status": "ok" if self._worker.alive else "stopped"}
        code = 200 if self._worker.alive else 503
        return JSONResponse(status | {"running": running, "waiting": waiting}, code)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self._reader.name:
            raise ApiError(404, "no such model", "model", "model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._reader.name,
            "object": "model",
            "created": self._started,
            "owned_by": "zaya-convert",
            "max_model_len": self._reader.config.max_positions,
        }

    async def _complete(self, request: Request, chat: bool) -> Response:
        body = await _body(request)
        asked = await run_in_threadpool(self._reader.read, body, chat)
        running = _Running(asked, self._reader, self._worker)
        if asked.stream:
            return _Events(running)
        return await _unless_gone(request, running)


class _Choice:
    """Listens to one sequence, and passes on what it says to the event loop."""

    def __init__(self, asked: Asked, reader: Reader, post: Callable[[Part | Exception], None]):
        splitter = Splitter(asked.thinking) if asked.separate else None
        self._writer = Writer(reader.tokenizer, asked.stops, splitter)
        self._logprobs, self._post = asked.logprobs, post

    def take(self, step: Step, logits: Tensor) -> bool:
        """See ``worker.Listener``."""
        part = Part(tokens=[self._token(step.token, logits)], finished=step.finished)
        if step.finished != "stop":
            part.reasoning, part.content = self._writer.push(step.token)
        if self._writer.stopped:
            part.finished = "stop"
        if part.finished:
            reasoning, content = self._writer.flush()
            part.reasoning, part.content = part.reasoning + reasoning, part.content + content
        part.thinking = self._writer.thinking
        self._post(part)
        return not part.finished

    def fail(self, error: Exception) -> None:
        """See ``worker.Listener``."""
        self._post(error)

    def _token(self, id: int, logits: Tensor) -> Token:
        if self._logprobs is None:
            return Token(id)
        logprobs = logits.log_softmax(0)
        found = logprobs.topk(min(self._logprobs, len(logits)))
        others = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return Token(id, float(logprobs[id]), list(others))


class _Running:
    """A request whose sequences are on their way.

    Raises:
        ApiError: 503 when the server has no room for it.
    """

    def __init__(self, asked: Asked, reader: Reader, worker: Worker) -> None:
        self.asked = asked
        self.shapes = Shapes(asked, reader.name, reader.tokenizer)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Part | Exception]] = asyncio.Queue()
        self._jobs = [
            Job(task, _Choice(asked, reader, partial(self._post, index)))
            for index, task in enumerate(asked.tasks)
        ]
        try:
            worker.submit(self._jobs)
        except Full:
            raise ApiError(503, "the server is busy; try again later", code="busy") from None
        except Stopped as error:
            raise _explained(error) from None

    async def parts(self) -> AsyncIterator[tuple[int, Part]]:
        """(choice, part of it) as they come, up to the end of all choices.

        Raises:
            ApiError: the model failed.
        """
        left = len(self._jobs)
        while left:
            index, part = await self._queue.get()
            if isinstance(part, Exception):
                raise _explained(part)
            left -= bool(part.finished)
            yield index, part

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [Part() for _ in self._jobs]
        async for index, part in self.parts():
            choices[index].add(part)
        return self.shapes.whole(choices)

    def cancel(self) -> None:
        """Nobody listens any more."""
        for job in self._jobs:
            job.cancelled = True

    def _post(self, index: int, part: Part | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, part))


class _Events(StreamingResponse):
    """Server-sent events; a client that goes away cancels its request."""

    def __init__(self, running: _Running) -> None:
        super().__init__(_events(running), media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache"})  # fmt: skip
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()


async def _events(running: _Running) -> AsyncIterator[str]:
    shapes, asked = running.shapes, running.asked
    seen: set[int] = set()
    tokens = 0
    try:
        async for index, part in running.parts():
            tokens += len(part.tokens)
            first = index not in seen
            told = part.content or part.reasoning or part.finished
            if first or told or asked.token_ids or asked.logprobs is not None:
                yield _event(shapes.chunk(index, part, first))
            seen.add(index)
        if asked.include_usage:
            yield _event(shapes.last(tokens))
        yield "data: [DONE]\n\n"
    except ApiError as error:  # too late for a status
        yield _event(error.body())


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, running: _Running) -> Response:
    """The whole answer, or nothing if the client does not wait for it."""
    answer = asyncio.ensure_future(running.whole())
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return JSONResponse(answer.result())
    finally:
        running.cancel()
        answer.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """The body of a request.

    A page in a browser cannot send JSON to another site unasked, so other types are refused: this
    keeps web pages away from servers on the same machine.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body has to be sent as content-type application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_BYTES:
            raise ApiError(413, f"the body is larger than {_BODY_BYTES} bytes")
    return bytes(body)


def _explained(error: Exception) -> ApiError:
    """What a client is told when the model failed; details stay here, unless they are ours."""
    if isinstance(error, Stopped):
        return ApiError(503, "the server is going down", code="stopped")
    what = str(error) if isinstance(error, ZayaConvertError) else "internal error"
    failed = ApiError(500, what)
    failed.__cause__ = error
    return failed


async def _refused(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, error.detail)
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "internal error").body(), 500)


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # which nobody will read
