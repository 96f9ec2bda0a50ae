"""``Endpoint``: rollouts by a server with OpenAI's API: ours, llama-server, vLLM, SGLang, others.

Answers are streamed, so that the read timeout is about a server that has stalled, not about one
that is slow. An attempt that fails is made again as a whole; half an answer is never one.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import operator
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from zaya_convert.errors import InputError, UsageError
from zaya_convert.rsa.answers import THINK_CLOSE
from zaya_convert.rsa.generator import Answer, Request

if TYPE_CHECKING:
    from zaya_convert.runtime.generate import Sampling

T = TypeVar("T")

KEY_VARIABLE = "OPENAI_API_KEY"

_CHAT = "/chat/completions"
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0  # seconds between attempts, doubled each time
_LONGEST_WISH = 300.0  # most seconds of Retry-After that are waited for
_TRANSIENT = frozenset((408, 425, 429, 500, 502, 503, 504, 529))

# What a server is told beyond OpenAI's fields, by the ``owned_by`` of its models: to leave out the
# filters it applies when it is told nothing (or reads from generation_config.json), to leave the
# thinking marks in the text, and to tell tokens where it can.
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "zaya-convert": {"separate_reasoning": False, "return_token_ids": True},
    # a reused prompt may change last bits (says its manual)
    "llamacpp": {"top_k": 0, "min_p": 0.0, "reasoning_format": "none", "cache_prompt": False},
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "separate_reasoning": False},
}


class Endpoint:
    """A model behind OpenAI's API, as a ``Generator``.

    Args:
        url: the API's base, usually ending in ``/v1``, which is added to a bare host.
        model: its name there; None: the only one.
        key_variable: the environment variable that holds the key, if the server asks for one.
        concurrency: requests at a time.
        attempts: for each request, when the server is busy, fails or cannot be reached.
        connect_timeout: seconds.
        read_timeout: seconds between two pieces of an answer; the first comes after all waiting.
        logprobs: ask for them.
        fields: further fields of each request; they win over all others.

    Raises:
        UsageError: ``url`` is none, or the key cannot be sent.
        InputError: the server cannot be reached, does not know the model or refuses the key.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key_variable: str = KEY_VARIABLE,
        concurrency: int = 8,
        attempts: int = 6,
        connect_timeout: float = 10.0,
        read_timeout: float = 600.0,
        logprobs: bool = False,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        self.url = _base(url)
        self._key_variable, self._key = key_variable, os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UsageError(f"the key in {key_variable} holds characters that no key can have")
        self._concurrency, self._attempts = max(concurrency, 1), max(attempts, 1)
        self._timeout = httpx2.Timeout(read_timeout, connect=connect_timeout)
        self.model, kind = asyncio.run(self._find(model))
        self.name = f"{self.model} at {self.url}"
        self._fields = {
            **_FIELDS.get(kind, {}),
            **({"logprobs": True, "top_logprobs": 1} if logprobs else {}),
        }
        self._last_word = dict(fields or {})

    def generate(
        self,
        requests: Sequence[Request],
        *,
        budget: int,
        sampling: Sampling,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[Answer]:
        """See ``Generator``; ``progress`` is called when an answer is complete.

        Raises:
            InputError: a request failed for good, or the server does not keep to the budget; the
                others are given up.
        """
        how: dict[str, Any] = {
            "model": self.model,
            "max_tokens": budget,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields,
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
        }
        bodies = [
            how
            | {"messages": [{"role": "user", "content": request.message}], "seed": request.seed}
            | self._last_word
            for request in requests
        ]
        return asyncio.run(self._all(bodies, budget, progress))

    async def _all(
        self, bodies: Sequence[Mapping[str, Any]], budget: int, progress: Callable[[int], None]
    ) -> list[Answer]:
        room = asyncio.Semaphore(self._concurrency)
        done = 0

        async def one(body: Mapping[str, Any]) -> Answer:
            nonlocal done
            async with room:
                answer = await self._patiently(lambda: self._ask(client, body))
            if answer.new_tokens > budget:
                raise InputError(
                    f"gave {answer.new_tokens} tokens where at most {budget} were asked for",
                    self.url,
                )
            done += 1
            progress(answer.new_tokens)
            return answer

        async with self._client() as client:
            tasks = [asyncio.create_task(one(body)) for body in bodies]
            try:
                return list(await asyncio.gather(*tasks))
            except InputError as error:
                came = f"{done} of {len(bodies)} answers had come"
                raise InputError(f"{error} ({came})") from None
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _find(self, model: str | None) -> tuple[str, str]:
        """The model's name, and what kind of server has it ("" if it does not say)."""
        async with self._client() as client:
            try:
                listed = await self._patiently(lambda: self._listed(client))
            except _Missing:
                if model is None:
                    raise InputError(
                        "has no /models; is this the API's base, usually ending in /v1? "
                        "If it is, name the model", self.url,
                    ) from None  # fmt: skip
                return model, ""
        cards = {str(card.get("id")): card for card in listed if isinstance(card, dict)}
        if model is None and len(cards) != 1:
            known = ", ".join(sorted(cards)[:10]) or "none"
            raise InputError(f"has {len(cards)} models ({known}); name one", self.url)
        name = model if model is not None else next(iter(cards))
        card = cards.get(name) or next(iter(cards.values()), {})
        return name, str(card.get("owned_by") or "")

    async def _listed(self, client: httpx2.AsyncClient) -> list[Any]:
        response = await client.get(f"{self.url}/models")
        if response.status_code == 404:
            raise _Missing
        self._check(response, response.text)
        listed = self._parsed(response.text).get("data")
        if not isinstance(listed, list):
            raise InputError("/models does not list any; is this OpenAI's API?", self.url)
        return listed

    def _client(self) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=self._concurrency)
        return httpx2.AsyncClient(headers=headers, timeout=self._timeout, limits=limits)

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Make an attempt until it succeeds, fails for good, or has been made often enough.

        Raises:
            InputError: it did not succeed.
        """
        for number in range(1, self._attempts + 1):
            try:
                return await attempt()
            except (httpx2.RequestError, _Transient) as error:
                what, wish = _described(error), getattr(error, "wish", None)
                if number == self._attempts:
                    tries = "1 attempt" if number == 1 else f"{number} attempts"
                    raise InputError(f"gave up after {tries}: {what}", self.url) from None
            except httpx2.InvalidURL as error:
                raise UsageError(f"{self.url}: {error}") from None
            if wish is not None and wish > _LONGEST_WISH:
                raise InputError(f"asks to wait for {wish:.0f} seconds: {what}", self.url)
            delay = min(_FIRST_DELAY * 2 ** (number - 1), _LONGEST_DELAY)
            await asyncio.sleep(max(wish or 0.0, delay * random.uniform(0.5, 1.0)))
        raise AssertionError("at least one attempt is made")

    async def _ask(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> Answer:
        """One attempt at one request."""
        heard = _Heard()
        async with client.stream("POST", f"{self.url}{_CHAT}", json=body) as response:
            if response.status_code != 200:
                self._check(response, (await response.aread()).decode("utf-8", "replace"))
            kind = response.headers.get("content-type", "")
            if kind.startswith("text/event-stream"):
                async for data in _events(response.aiter_lines()):
                    heard.add(self._parsed(data), self.url)
            else:  # a server that does not stream
                whole = (await response.aread()).decode("utf-8", "replace")
                heard.add(self._parsed(whole), self.url)
        return heard.answer(self.url)

    def _parsed(self, text: str) -> dict[str, Any]:
        """A JSON object.

        Raises:
            _Transient: it breaks off, as when a server dies behind a proxy that ends the answer.
            InputError: it is none.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            if text.lstrip().startswith("{"):
                raise _Transient("an answer broke off")
            begin = " ".join(text[:60].split())
            raise InputError(f"answers with something that is not JSON: {begin!r}; "
                             "is this OpenAI's API?", self.url)  # fmt: skip
        return value

    def _check(self, response: httpx2.Response, text: str) -> None:
        """Make sure that a status is 200.

        Raises:
            _Transient: it may be another time.
            InputError: it will not.
        """
        status = response.status_code
        what = f"status {status}: {_complaint(text)}".rstrip(": ")
        if status == 200:
            return
        if status in _TRANSIENT:
            raise _Transient(what, _wish(response.headers.get("retry-after")))
        if status in (401, 403):
            state = "refuses the key in" if self._key else "asks for a key; set"
            raise InputError(f"{state} {self._key_variable} ({what})", self.url)
        if status == 404:
            raise InputError(f"does not know {self.model!r}, or has no {_CHAT} ({what})", self.url)
        if 300 <= status < 400:
            raise InputError(f"redirects to {response.headers.get('location')}", self.url)
        raise InputError(f"refuses the request ({what})", self.url)


class _Missing(Exception):
    """There is no list of models."""


class _Transient(Exception):
    """A failure that may pass.

    Args:
        wish: how many seconds the server wants to be left alone, if it says.
    """

    def __init__(self, message: str, wish: float | None = None) -> None:
        super().__init__(message)
        self.wish = wish


@dataclass
class _Heard:
    """What has come of one answer."""

    content: str = ""
    reasoning: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: str = ""
    prompt_tokens: Any = None
    new_tokens: Any = None

    def add(self, chunk: Mapping[str, Any], url: str) -> None:
        """Take in a chunk of a stream, or a whole answer.

        Raises:
            _Transient: it is an error.
            InputError: it has another form.
        """
        if chunk.get("error"):
            raise _Transient(f"failed half way: {_complaint(json.dumps(chunk))}")
        try:
            self._take(chunk)
        except (AttributeError, KeyError, TypeError, ValueError):
            begin = json.dumps(chunk)[:100]
            raise InputError(f"answers in another form than OpenAI's API: {begin}", url) from None

    def _take(self, chunk: Mapping[str, Any]) -> None:
        for choice in chunk.get("choices") or ():
            said = choice.get("delta") or choice.get("message") or {}
            self.content += said.get("content") or ""
            self.reasoning += said.get("reasoning_content") or said.get("reasoning") or ""
            self.finished = choice.get("finish_reason") or self.finished
            told = (choice.get("logprobs") or {}).get("content") or ()
            self.logprobs += [_number(token["logprob"]) for token in told]
            # llama-server has its ids beside the logprobs
            ids = choice.get("token_ids") or [token["id"] for token in told if "id" in token]
            self.tokens += map(operator.index, ids)
        usage = chunk.get("usage")
        if usage:
            self.prompt_tokens = usage.get("prompt_tokens")
            self.new_tokens = usage.get("completion_tokens")

    def answer(self, url: str) -> Answer:
        """All of it; the stop token, which servers count and some tell, is left out.

        Raises:
            _Transient: the answer has no end.
            InputError: it ended in a way that is no answer, or does not say what it took.
        """
        if not self.finished or self.finished == "abort":
            raise _Transient("an answer broke off")
        if self.finished not in ("stop", "length"):
            raise InputError(f"ended an answer with {self.finished!r}", url)
        prompt, new = self.prompt_tokens, self.new_tokens
        if not isinstance(prompt, int) or not isinstance(new, int):
            raise InputError("does not tell how many tokens an answer took (usage)", url)
        kept = max(new - (self.finished == "stop"), 0)
        told = (kept, new)
        return Answer(
            text=self._text(),
            tokens=tuple(self.tokens[:kept]) if self.tokens and len(self.tokens) in told else None,
            prompt_tokens=prompt,
            new_tokens=kept,
            finished=self.finished,
            logprobs=(
                tuple(self.logprobs[:kept])
                if self.logprobs and len(self.logprobs) in told
                else None
            ),
        )

    def _text(self) -> str:
        """The text as the model wrote it; a server that took the reasoning out dropped its mark."""
        closed = THINK_CLOSE if self.reasoning and self.content else ""
        text = self.reasoning + closed + self.content
        # JSON can write half a character, and pieces of a stream each a half of one
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _number(value: Any) -> float:
    """A number; ``json`` takes NaN and infinities for some too."""
    if not math.isfinite(value):
        raise ValueError(value)
    return float(value)


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The data of server-sent events; each of these servers writes one line an event."""
    async for line in lines:
        name, _, data = line.partition(":")
        if name == "data" and data.strip() != "[DONE]":
            yield data
        elif name == "error":  # an older llama-server
            yield f'{{"error": {data}}}'


def _base(url: str) -> str:
    """The API's base, from what people type."""
    try:
        parsed = httpx2.URL(url.strip())
    except httpx2.InvalidURL as error:
        raise UsageError(f"{url!r} is no URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"{url!r} is no URL of a server; write it like http://localhost:8080/v1")
    if parsed.userinfo:
        raise UsageError("a key does not belong into a URL; put it into the environment")
    base = str(parsed.copy_with(query=None, fragment=None)).rstrip("/").removesuffix(_CHAT)
    return base if parsed.path.strip("/") else f"{base}/v1"


def _complaint(text: str) -> str:
    """What a server says is wrong, in one line."""
    try:
        said: Any = json.loads(text)
    except (ValueError, RecursionError):
        said = text
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and name in said:
            said = said[name]
    return " ".join(str(said).split())[:300]


def _described(error: Exception) -> str:
    """A failed attempt, for people."""
    if isinstance(error, httpx2.ConnectTimeout):
        return "no connection within the time allowed"
    if isinstance(error, httpx2.TimeoutException):
        return "nothing came for longer than the read timeout"
    if isinstance(error, httpx2.ConnectError):
        return f"cannot be reached ({error})"
    return f"{error}" if isinstance(error, _Transient) else f"the connection broke ({error})"


def _wish(header: str | None) -> float | None:
    """The seconds of a Retry-After header, which may also be a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))  # in this order nan is 0
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(moment.timestamp() - time.time(), 0.0)
