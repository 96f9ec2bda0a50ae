"""``Endpoint``: equal to a local run through our server, and patient with servers that are not."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from serving import Misbehaving, Reply, misbehaving, reply, reset, served
from zaya_convert.checkpoint import open_source
from zaya_convert.errors import InputError, UsageError
from zaya_convert.rsa import endpoint
from zaya_convert.rsa.endpoint import Endpoint
from zaya_convert.rsa.generator import Answer, Generator, Request
from zaya_convert.rsa.local import LocalGenerator
from zaya_convert.runtime.generate import Sampling
from zaya_convert.runtime.model import Model
from zaya_convert.runtime.tokenizer import Tokenizer

HOT = Sampling(1.2, top_p=0.9, top_k=40)
ONE = [Request("hello", 3)]


def event(**choice: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, **choice}]})}\n\n"


USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}}\n\n'
GOOD_EVENTS = (
    event(delta={"role": "assistant", "content": None})
    + event(delta={"content": "wh"})
    + ": a comment\n\n"
    + event(delta={"content": "y</think>4"}, finish_reason="stop")
    + USAGE
    + "data: [DONE]\n\n"
)
EVENTS = "text/event-stream; charset=utf-8"
GOOD = reply(200, GOOD_EVENTS, EVENTS)
ANSWER = Answer("why</think>4", None, 4, 2, "stop")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_FIRST_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def answers(server: Misbehaving, requests: list[Request] = ONE, **options: Any) -> list[Answer]:
    return Endpoint(server.url, **options).generate(requests, budget=9, sampling=HOT)


@pytest.fixture(scope="module")
def both(bundled: Path, one_thread: None) -> Iterator[tuple[LocalGenerator, str]]:
    checkpoint = open_source(bundled)
    model, tokenizer = Model(checkpoint), Tokenizer.of(checkpoint)
    with served(model, tokenizer, separate=True, batch=3) as server:
        yield LocalGenerator(model, tokenizer), server.url


@pytest.mark.parametrize("sampling", [HOT, Sampling()], ids=["sampled", "greedy"])
def test_our_server_equals_a_local_run(
    both: tuple[LocalGenerator, str], sampling: Sampling
) -> None:
    local, url = both
    requests = [Request(f"Compute {i} + 3.", 1000 + i) for i in range(5)]
    remote: Generator = Endpoint(url, logprobs=True)
    counted: list[int] = []
    found = remote.generate(requests, budget=20, sampling=sampling, progress=counted.append)
    expected = local.generate(requests, budget=20, sampling=sampling)
    for ours, theirs in zip(expected, found, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-6)
        assert (ours.text, ours.tokens, ours.prompt_tokens, ours.new_tokens, ours.finished) == (
            theirs.text, theirs.tokens, theirs.prompt_tokens, theirs.new_tokens, theirs.finished,
        )  # fmt: skip
    assert sum(counted) == sum(answer.new_tokens for answer in found)
    assert "tiny" in remote.name


def test_an_answer_that_stops_equals_it_too(both: tuple[LocalGenerator, str]) -> None:
    local, url = both
    requests = [Request("Compute 2 + 3.", 5)]
    (ours,) = local.generate(requests, budget=400, sampling=Sampling())
    (theirs,) = Endpoint(url).generate(requests, budget=400, sampling=Sampling())
    assert ours.finished == "stop"
    assert "</think>" in ours.text
    assert (theirs.text, theirs.tokens, theirs.new_tokens) == (
        ours.text, ours.tokens, ours.new_tokens,
    )  # fmt: skip
    assert theirs.logprobs is None


def test_a_prompt_that_is_too_long_is_refused(both: tuple[LocalGenerator, str]) -> None:
    with pytest.raises(InputError, match=r"refuses the request .*context is 2048.*0 of 1 answers"):
        Endpoint(both[1]).generate([Request("7*8" * 1000, 1)], budget=5, sampling=HOT)


def test_what_is_asked() -> None:
    with misbehaving([GOOD]) as server:
        assert answers(server) == [ANSWER]
        plain = Sampling(0.7)
        Endpoint(server.url, logprobs=True, fields={"seed": 9, "x": 1}).generate(
            ONE, budget=9, sampling=plain
        )
        first, second = server.bodies
    assert first == {
        "model": "m", "messages": [{"role": "user", "content": "hello"}], "seed": 3,
        "max_tokens": 9, "temperature": 1.2, "top_p": 0.9, "top_k": 40, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert "top_k" not in second
    assert (second["logprobs"], second["seed"], second["x"]) == (True, 9, 1)


@pytest.mark.parametrize("owner", ["llamacpp", "vllm", "sglang", "zaya-convert"])
def test_known_servers_are_told_to_leave_out_their_own_filters(owner: str) -> None:
    models = reply(200, json.dumps({"data": [{"id": "m", "owned_by": owner}]}))
    with misbehaving([GOOD], models) as server:
        answers(server)
        Endpoint(server.url).generate(ONE, budget=9, sampling=Sampling(1.0))
    assert server.bodies[0]["top_k"] == 40
    if owner != "zaya-convert":
        assert server.bodies[1]["top_k"] in (0, -1)
        assert server.bodies[1]["min_p"] == 0


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_put_back_in_front(name: str) -> None:
    end = event(delta={}, finish_reason="length") + USAGE
    thought = event(delta={name: "wh"}) + event(delta={name: "y"})
    said = event(delta={"content": "4"})
    with misbehaving(
        [reply(200, thought + said + end, EVENTS), reply(200, thought + end, EVENTS)]
    ) as s:
        texts = [answer.text for answer in answers(s) + answers(s)]
    assert texts == ["why</think>4", "why"]


def test_tokens_and_logprobs_of_llama_server_and_vllm() -> None:
    def told(*tokens: tuple[int, float]) -> dict[str, Any]:
        return {"content": [{"id": i, "token": "", "logprob": p} for i, p in tokens]}

    llama = event(delta={"content": "a"}, logprobs=told((5, -0.5), (6, -1.5))) + event(
        delta={}, finish_reason="stop"
    )
    vllm = event(delta={"content": "ab"}, token_ids=[5, 6]) + event(
        delta={"content": ""}, token_ids=[2], finish_reason="stop"
    )
    partly = event(delta={"content": "ab"}, token_ids=[5], finish_reason="stop")
    streams = [reply(200, text + USAGE, EVENTS) for text in (llama, vllm, partly)]
    with misbehaving(streams) as server:
        found = [answers(server)[0] for _ in streams]
    assert [answer.tokens for answer in found] == [(5, 6), (5, 6), None]
    assert [answer.logprobs for answer in found] == [(-0.5, -1.5), None, None]
    assert {answer.new_tokens for answer in found} == {2}


def test_a_server_that_does_not_stream() -> None:
    whole = {
        "choices": [{"message": {"reasoning": "why", "content": "4"}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 3},
    }
    with misbehaving([reply(200, json.dumps(whole))]) as server:
        assert answers(server) == [Answer("why</think>4", None, 4, 3, "length")]


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1)


def breaks_off(handler: BaseHTTPRequestHandler) -> None:
    text = event(delta={"content": "half of it"})
    handler.wfile.write(
        f"HTTP/1.1 200 OK\r\nContent-Type: {EVENTS}\r\nContent-Length: 999\r\n\r\n{text}".encode()
    )


FAILED_HALF_WAY = event(delta={"content": "x"}) + 'data: {"error": {"message": "oom"}}\n\n'


@pytest.mark.parametrize(
    "failure",
    [
        reply(503, "{}"),
        reply(429, "{}", Retry_After="0"),
        reply(500, "<html>"),
        reply(502, "<html>", "text/html"),
        reset,
        hang,
        breaks_off,
        reply(200, event(delta={"content": "no end"}), EVENTS),
        reply(200, FAILED_HALF_WAY, EVENTS),
        reply(200, 'error: {"message": "oom"}\n\n', EVENTS),
        reply(200, event(delta={"content": "x"}, finish_reason="abort") + USAGE, EVENTS),
        reply(200, GOOD_EVENTS[:120], EVENTS),
        reply(200, '{"choices": [{"mess'),
        reply(200, GOOD_EVENTS, EVENTS, Content_Encoding="gzip"),
        reply(500, '{"error": ' + "[" * 100_000),
    ],
)
def test_what_may_pass_is_tried_again(failure: Reply) -> None:
    with misbehaving([failure, failure, GOOD]) as server:
        assert answers(server, read_timeout=0.2) == [ANSWER]
        assert len(server.bodies) == 3
        assert server.bodies[0] == server.bodies[2]


def test_attempts_end() -> None:
    with misbehaving([reply(503, '{"error": {"message": "no\\nroom"}}')]) as server:
        with pytest.raises(InputError, match=r"gave up after 3 attempts: status 503: no room"):
            answers(server, attempts=3)
        assert len(server.bodies) == 3
    with (
        misbehaving([hang]) as server,
        pytest.raises(InputError, match="gave up after 2 attempts: nothing came"),
    ):
        answers(server, attempts=2, read_timeout=0.1)


@pytest.mark.parametrize("date", [False, True])
def test_it_waits_as_long_as_it_is_told(date: bool) -> None:
    # a date has whole seconds, so two ahead is more than one
    wish = formatdate(time.time() + 2, usegmt=True) if date else "1"
    with misbehaving([reply(429, "{}", Retry_After=wish), GOOD]) as server:
        began = time.monotonic()
        answers(server)
        assert time.monotonic() - began >= (0.5 if date else 1)
    with (
        misbehaving([reply(429, "{}", Retry_After="86400")]) as server,
        pytest.raises(InputError, match="asks to wait for 86400 seconds"),
    ):
        answers(server)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (reply(400, '{"error": {"message": "seed too large"}}'), "refuses .*400: seed too large"),
        (reply(401, '{"error": "no key"}'), "asks for a key; set OPENAI_API_KEY"),
        (reply(404, '{"error": {"message": "gone"}}'), "does not know 'm'.*404: gone"),
        (reply(307, "", Location="http://elsewhere/"), "redirects to http://elsewhere/"),
        (reply(200, "<html>hello", "text/html"), "not JSON: '<html>hello'"),
        (reply(200, "data: <html>\n\n", EVENTS), "not JSON"),
        (reply(200, event(finish_reason="content_filter") + USAGE, EVENTS), "content_filter"),
        (reply(200, event(finish_reason="stop"), EVENTS), "how many tokens"),
        (reply(200, '{"choices": "none"}'), "in another form"),
        (reply(200, event(delta="text"), EVENTS), "in another form"),
        (reply(200, event(delta={"content": 5}), EVENTS), "in another form"),
        (reply(200, event(token_ids="123"), EVENTS), "in another form"),
        (reply(200, event(logprobs={"content": [{"logprob": math.nan}]}), EVENTS), "another form"),
        (reply(200, '{"usage": [1]}'), "in another form"),
        (reply(200, "[" * 100_000), "not JSON"),
        (reply(200, GOOD_EVENTS.replace(": 3", ": 99"), EVENTS), "98 tokens where at most 9"),
    ],
)
def test_what_will_not_pass_is_said_at_once(failure: Reply, message: str) -> None:
    with misbehaving([failure]) as server:
        with pytest.raises(InputError, match=message) as caught:
            answers(server)
        assert len(server.bodies) == 1
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_failure_ends_all_and_says_how_many_had_come() -> None:
    bad = reply(400, '{"error": {"message": "too long"}}')
    with (
        misbehaving([GOOD, GOOD, bad]) as server,
        pytest.raises(InputError, match=r"too long\) \(2 of 9 answers had come\)"),
    ):
        answers(server, [Request("q", i) for i in range(9)], concurrency=1)


def test_requests_are_answered_in_order_and_no_more_at_a_time_than_allowed() -> None:
    running: list[int] = [0, 0]

    def slowly(handler: BaseHTTPRequestHandler) -> None:
        running[0] += 1
        running[1] = max(running)
        time.sleep(0.03)
        running[0] -= 1
        seed = server.bodies[-1]["seed"] if running[1] == 1 else 0
        text = event(delta={"content": str(seed)}, finish_reason="length") + USAGE
        reply(200, text, EVENTS)(handler)

    for most in (1, 3):
        running[:] = [0, 0]
        with misbehaving([slowly]) as server:
            found = answers(server, [Request("q", i) for i in range(7)], concurrency=most)
        assert running[1] == most
        if most == 1:
            assert [answer.text for answer in found] == [str(i) for i in range(7)]


def test_the_key_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    with misbehaving([GOOD, reply(401, '{"error": "bad key"}')]) as server:
        answers(server, key_variable="MY_KEY")
        assert server.headers[0]["Authorization"] == "Bearer sesame"
        with pytest.raises(InputError, match="refuses the key in MY_KEY") as caught:
            answers(server, key_variable="MY_KEY")
        assert "sesame" not in str(caught.value)


def test_a_key_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(UsageError, match="OPENAI_API_KEY") as caught:
        Endpoint("http://127.0.0.1:1")
    assert "schl" not in str(caught.value)


def test_halves_of_characters_are_put_together() -> None:
    halves = [event(delta={"content": half}) for half in ("\ud83d", "\ude00", "\ud83d!")]
    text = "".join(halves) + event(finish_reason="length") + USAGE
    with misbehaving([reply(200, text, EVENTS)]) as server:
        assert answers(server)[0].text == "\U0001f600\ufffd!"


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (reply(200, '{"data": [{"id": "a"}, {"id": "b"}]}'), r"has 2 models \(a, b\); name one"),
        (reply(200, '{"data": []}'), r"has 0 models \(none\)"),
        (reply(200, "{}"), "does not list any"),
        (reply(200, "hello"), "not JSON: 'hello'"),
        (reply(404, "no"), "has no /models"),
        (reply(401, "no"), "asks for a key"),
    ],
)
def test_which_model(models: Reply, message: str) -> None:
    with misbehaving([GOOD], models) as server, pytest.raises(InputError, match=message):
        Endpoint(server.url)


def test_a_model_by_name_needs_no_list() -> None:
    with misbehaving([GOOD], reply(404, "no")) as server:
        answers(server, model="named")
    assert server.bodies[0]["model"] == "named"


def test_nobody_there() -> None:
    with misbehaving([GOOD]) as server:
        pass
    with pytest.raises(InputError, match=r"gave up after 2 attempts: cannot be reached"):
        Endpoint(server.url, attempts=2)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("http://host:80", "http://host/v1"),
        ("http://host:8080/", "http://host:8080/v1"),
        ("http://host/v1/", "http://host/v1"),
        ("https://host/api/v1/chat/completions", "https://host/api/v1"),
        (" http://[::1]:8080/v1?x=1 ", "http://[::1]:8080/v1"),
    ],
)
def test_urls(typed: str, meant: str) -> None:
    assert endpoint._base(typed) == meant


@pytest.mark.parametrize("typed", ["host:8080", "", "ftp://host", "http://", "http://k:v@host/v1"])
def test_what_is_no_url(typed: str) -> None:
    with pytest.raises(UsageError):
        Endpoint(typed)
