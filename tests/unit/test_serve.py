"""The server: what it answers equals what the runtime generates, whoever else is asking."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from torch import Tensor

from serving import NAME, Served, served
from zaya_convert.checkpoint import open_source
from zaya_convert.runtime.generate import Completion, Sampling, complete
from zaya_convert.runtime.model import Model, Output
from zaya_convert.runtime.tokenizer import Tokenizer

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "Compute 2 + 3."}]
HOT = {"temperature": 1.3, "top_p": 0.95, "top_k": 50}


class Slow(Model):
    """The model, each of whose passes first does what a test says."""

    before: Callable[[], object] = staticmethod(lambda: None)
    passes = 0
    columns = 0  # of the latest pass

    def forward(self, ids: Tensor, **how: Any) -> Output:
        self.passes += 1
        self.columns = ids.shape[1]
        self.before()
        return super().forward(ids, **how)


@pytest.fixture(scope="module")
def model(bundled: Path) -> Slow:
    return Slow(open_source(bundled))


@pytest.fixture(scope="module")
def tokenizer(bundled: Path) -> Tokenizer:
    return Tokenizer.of(open_source(bundled))


@pytest.fixture(scope="module")
def server(model: Slow, tokenizer: Tokenizer, one_thread: None) -> Iterator[Served]:
    with served(model, tokenizer, batch=6, waiting=6) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def slow(model: Slow) -> Iterator[Slow]:
    yield model
    del model.before


def ask(http: httpx2.Client, path: str, **fields: Any) -> dict[str, Any]:
    answer = http.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(http: httpx2.Client, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    answer = http.post(path, json=fields)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error


def events(http: httpx2.Client, path: str, **fields: Any) -> list[dict[str, Any]]:
    with http.stream("POST", path, json={"stream": True, **fields}) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def local(
    model: Model, tokenizer: Tokenizer, prompt: list[int], stream: tuple[int, ...], **how: Any
) -> Completion:
    return complete(
        model, [prompt], max_new_tokens=how.pop("limit", 16), sampling=Sampling(**how),
        stop_ids=tokenizer.stop_ids, streams=[stream],
    )[0]  # fmt: skip


def test_chat_equals_the_runtime_token_by_token(
    model: Slow, tokenizer: Tokenizer, http: httpx2.Client
) -> None:
    prompt = tokenizer.chat(QUESTION)
    found = ask(http, CHAT, messages=QUESTION, max_tokens=16, seed=7, n=3, return_token_ids=True,
                **HOT)  # fmt: skip
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    for i, choice in enumerate(found["choices"]):
        expected = local(model, tokenizer, prompt, (7, i) if i else (7,), **HOT)
        assert choice["token_ids"][: len(expected.tokens)] == expected.tokens
        assert choice["finish_reason"] == expected.finished
        text = tokenizer.decode(expected.tokens, skip_special=False)
        assert choice["message"] == {"role": "assistant", "content": text}
    tokens = sum(len(choice["token_ids"]) for choice in found["choices"])
    assert found["usage"] == {
        "prompt_tokens": len(prompt), "completion_tokens": tokens,
        "total_tokens": len(prompt) + tokens,
    }  # fmt: skip
    again = ask(http, CHAT, messages=QUESTION, max_tokens=16, seed=7, return_token_ids=True, **HOT)
    assert again["choices"][0] == found["choices"][0]


def test_completions_take_texts_and_tokens(
    model: Slow, tokenizer: Tokenizer, http: httpx2.Client
) -> None:
    ids = tokenizer.encode("2+3=")
    for prompt, count in (("2+3=", 1), (ids, 1), (["2+3=", "7*"], 2), ([ids, ids], 2)):
        found = ask(http, PLAIN, prompt=prompt, max_tokens=5, temperature=0)
        assert len(found["choices"]) == count
        expected = local(model, tokenizer, ids, (0,), limit=5)
        assert found["choices"][0]["text"] == tokenizer.decode(expected.tokens, False)
        assert found["object"] == "text_completion"
    assert ask(http, PLAIN, prompt="2+3=", temperature=0)["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_streaming_says_the_same(http: httpx2.Client, path: str) -> None:
    asked = {"messages": QUESTION} if path == CHAT else {"prompt": "2+3="}
    asked |= {"max_tokens": 14, "seed": 5, "n": 2, "return_token_ids": True, **HOT}
    whole = ask(http, path, **asked)
    chunks = events(http, path, stream_options={"include_usage": True}, **asked)
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["choices"] == []
    assert len({chunk["id"] for chunk in chunks}) == 1
    for expected in whole["choices"]:
        parts = [c["choices"][0] for c in chunks[:-1]]
        parts = [part for part in parts if part["index"] == expected["index"]]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == expected["finish_reason"]
        assert [id for part in parts for id in part["token_ids"]] == expected["token_ids"]
        if path == CHAT:
            assert parts[0]["delta"]["role"] == "assistant"
            text = "".join(part["delta"].get("content") or "" for part in parts)
            assert text == expected["message"]["content"]
        else:
            assert "".join(part["text"] for part in parts) == expected["text"]
    assert "usage" not in events(http, path, **asked)[-1]


def test_requests_that_meet_do_not_change_each_other(http: httpx2.Client, slow: Slow) -> None:
    asked = [
        {"messages": [{"role": "user", "content": f"Compute {i} + {3 * i}{' ' * 5 * i}."}],
         "max_tokens": 6 + 4 * i, "seed": i, "temperature": 0.5 * i, "top_k": 10 * i}
        for i in range(8)
    ]  # fmt: skip
    alone = [ask(http, CHAT, **fields)["choices"] for fields in asked]
    slow.before, before = (lambda: time.sleep(0.01)), slow.passes
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda fields: ask(http, CHAT, **fields)["choices"], asked))
    assert together == alone
    assert slow.passes - before < sum(fields["max_tokens"] for fields in asked) / 2


def test_a_long_prompt_does_not_hold_up_the_others(http: httpx2.Client, slow: Slow) -> None:
    long = {"prompt": [5] * 1500, "max_tokens": 1, "seed": 1}
    alone, columns = ask(http, PLAIN, **long), list[int]()
    slow.before = lambda: columns.append(slow.columns) or time.sleep(0.01)
    short = {"prompt": "2+3=", "max_tokens": 400, "seed": 0, "stream": True, "temperature": 2}
    with http.stream("POST", PLAIN, json=short):
        until(lambda: 1 in columns)
        assert ask(http, PLAIN, **long)["choices"] == alone["choices"]
    first = columns.index(256)
    assert columns[first : first + 6] == [256, 1] * 3


def test_stop_strings(http: httpx2.Client) -> None:
    asked = {"messages": QUESTION, "max_tokens": 24, "temperature": 0}
    full = ask(http, CHAT, **asked)["choices"][0]["message"]["content"]
    stop = full[5:8]
    for stops in (stop, ["not in there", stop]):
        found = ask(http, CHAT, stop=stops, **asked)
        choice = found["choices"][0]
        assert choice["message"]["content"] == full[: full.index(stop)]
        assert choice["finish_reason"] == "stop"
        assert found["usage"]["completion_tokens"] < 24
        chunks = events(http, CHAT, stop=stops, **asked)
        texts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
        assert "".join(texts) == choice["message"]["content"]


def test_reasoning_apart_is_the_same_text(http: httpx2.Client, tokenizer: Tokenizer) -> None:
    asked = {"messages": QUESTION, "max_tokens": 200, "temperature": 0}
    text = ask(http, CHAT, **asked)["choices"][0]["message"]["content"]
    reasoning, mark, rest = text.partition("</think>")
    assert mark, "the bundled model thinks, and then answers"
    message = ask(http, CHAT, separate_reasoning=True, **asked)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (reasoning, rest)
    deltas = [
        chunk["choices"][0]["delta"]
        for chunk in events(http, CHAT, separate_reasoning=True, **asked)
    ]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == reasoning
    assert "".join(delta.get("content", "") for delta in deltas) == rest
    cut = ask(http, CHAT, separate_reasoning=True, **(asked | {"max_tokens": 3}))
    assert cut["choices"][0]["message"]["content"] is None


def test_logprobs(http: httpx2.Client, tokenizer: Tokenizer, model: Slow) -> None:
    asked = {"messages": QUESTION, "max_tokens": 6, "temperature": 0}
    told = ask(http, CHAT, logprobs=True, top_logprobs=3, **asked)["choices"][0]["logprobs"]
    assert len(told["content"]) == 6
    for token in told["content"]:
        assert len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0]["token"] == token["token"]
        assert token["top_logprobs"][0]["logprob"] == token["logprob"] <= 0
        assert bytes(token["bytes"]).decode() == token["token"]
    plain = ask(http, PLAIN, prompt="2+3=", max_tokens=3, temperature=0, logprobs=2)
    told = plain["choices"][0]["logprobs"]
    assert "".join(told["tokens"]) == plain["choices"][0]["text"]
    assert told["text_offset"] == [0, 1, 2]
    assert [len(others) for others in told["top_logprobs"]] == [2, 2, 2]


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        (CHAT, {}, 400, "messages"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
         "messages[0].content"),
        (CHAT, {"messages": ["hello"]}, 400, "messages[0]"),
        (CHAT, {"messages": QUESTION, "model": "other"}, 404, "model"),
        (CHAT, {"messages": QUESTION, "temperature": -1}, 400, None),
        (CHAT, {"messages": QUESTION, "temperature": "hot"}, 400, "temperature"),
        (CHAT, {"messages": QUESTION, "max_tokens": 0}, 400, "max_tokens"),
        (CHAT, {"messages": QUESTION, "max_tokens": True}, 400, "max_tokens"),
        (CHAT, {"messages": QUESTION, "n": 13}, 400, "n"),
        (CHAT, {"messages": QUESTION, "seed": -1}, 400, "seed"),
        (CHAT, {"messages": QUESTION, "stop": [""]}, 400, "stop"),
        (CHAT, {"messages": QUESTION, "temprature": 1}, 400, "temprature"),
        (CHAT, {"messages": QUESTION, "presence_penalty": 1}, 400, "presence_penalty"),
        (CHAT, {"messages": QUESTION, "tools": [{}]}, 400, "tools"),
        (CHAT, {"messages": QUESTION, "top_logprobs": 2}, 400, "top_logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": "7*8" * 1000}]}, 400, "messages"),
        (CHAT, {"messages": QUESTION, "chat_template_kwargs": {"messages": 3}}, 422, "messages"),
        (PLAIN, {"prompt": ""}, 400, "prompt"),
        (PLAIN, {"prompt": [5, 100000]}, 400, "prompt"),
        (PLAIN, {"prompt": [{}]}, 400, "prompt"),
        (PLAIN, {"prompt": "2", "best_of": 3}, 400, "best_of"),
        (PLAIN, {"prompt": "2", "echo": True}, 400, "echo"),
        ("/v1/embeddings", {}, 404, None),
        ("/v1/models", {}, 405, None),
    ],
)  # fmt: skip
def test_what_it_refuses(
    http: httpx2.Client, path: str, fields: dict[str, Any], status: int, param: str | None
) -> None:
    found, error = refused(http, path, **fields)
    assert (found, error["param"]) == (status, param), error


def test_neutral_and_harmless_fields_are_taken(http: httpx2.Client) -> None:
    ask(http, CHAT, messages=QUESTION, max_completion_tokens=1, model=NAME, user="me", tools=[],
        presence_penalty=0, response_format={"type": "text"}, stop=None, top_k=-1)  # fmt: skip
    parts = [{"type": "text", "text": "Compute "}, {"type": "text", "text": "2 + 3."}]
    split, whole = (
        ask(http, CHAT, messages=[{"role": "user", "content": content}], temperature=0,
            max_tokens=8)["choices"]
        for content in (parts, "Compute 2 + 3.")
    )  # fmt: skip
    assert split == whole


def test_bodies_that_are_none(http: httpx2.Client) -> None:
    kind = {"content-type": "application/json"}
    half = b'{"prompt": "\\ud800"}'
    for body in (b"{", b"[]", b"\xff", b"[" * 99999, half):
        answer = http.post(PLAIN, content=body, headers=kind)
        assert (answer.status_code, "JSON" in answer.json()["error"]["message"]) == (400, True)
    assert http.post(CHAT, content=b"{}").status_code == 415
    large = http.post(CHAT, content=b" " * (17 << 20), headers=kind)
    assert (large.status_code, "larger" in large.json()["error"]["message"]) == (413, True)


def test_what_it_says_of_itself(http: httpx2.Client, model: Slow) -> None:
    (card,) = http.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == (NAME, model.config.max_positions)
    assert http.get(f"/v1/models/{NAME}").json() == card
    assert http.get("/v1/models/other").status_code == 404
    assert http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_place(
    server: Served, http: httpx2.Client, slow: Slow, stream: bool
) -> None:
    slow.before = lambda: time.sleep(0.02)
    fields = {"prompt": "2+3=", "max_tokens": 1500, "n": 4, "stream": stream, "temperature": 2}
    with (
        httpx2.Client(timeout=httpx2.Timeout(10, read=None if stream else 0.3)) as client,
        client.stream("POST", f"{server.url}{PLAIN}", json=fields) if stream
        else pytest.raises(httpx2.ReadTimeout),
    ):  # fmt: skip
        if stream:
            until(lambda: server.worker.counts[0] == 4)
        else:
            client.post(f"{server.url}{PLAIN}", json=fields)
    until(lambda: server.worker.counts == (0, 0))
    assert http.get("/health").json()["status"] == "ok"


def test_no_room(server: Served, http: httpx2.Client, slow: Slow) -> None:
    slow.before = lambda: time.sleep(0.02)
    fields = {"prompt": "2+3=", "max_tokens": 1500, "n": 10, "stream": True, "temperature": 2}
    with http.stream("POST", PLAIN, json=fields):
        until(lambda: server.worker.counts == (6, 4))
        busy = http.post(PLAIN, json={"prompt": "2", "n": 3})
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
        assert busy.json()["error"]["code"] == "busy"
    until(lambda: server.worker.counts == (0, 0))


def test_who_waited_and_went_away_leaves_room(
    server: Served, http: httpx2.Client, slow: Slow
) -> None:
    slow.before = lambda: time.sleep(0.02)
    fields = {"prompt": "2+3=", "max_tokens": 1500, "stream": True, "temperature": 2}
    with http.stream("POST", PLAIN, json=fields | {"n": 6}):
        for _ in range(3):
            with http.stream("POST", PLAIN, json=fields | {"n": 6}) as waits:
                assert waits.status_code == 200
            until(lambda: all(job.cancelled for job in server.worker._waiting))
    until(lambda: server.worker.counts == (0, 0))


def test_a_model_that_fails_is_no_end(http: httpx2.Client, slow: Slow) -> None:
    def fail() -> None:
        raise RuntimeError("secret detail")

    slow.before = fail
    answer = http.post(PLAIN, json={"prompt": "2"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    with http.stream("POST", PLAIN, json={"prompt": "2", "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert "error" in json.loads(lines[-1].removeprefix("data: "))
    slow.before = lambda: None
    assert ask(http, PLAIN, prompt="2", max_tokens=1)["choices"]


def test_stopping_ends_what_runs(model: Slow, tokenizer: Tokenizer) -> None:
    model.before = lambda: time.sleep(0.02)
    try:
        with served(model, tokenizer) as own:
            thread = ThreadPoolExecutor(1).submit(
                httpx2.post, f"{own.url}{PLAIN}", timeout=60,
                json={"prompt": "2+3=", "max_tokens": 60, "temperature": 2, "seed": 1},
            )  # fmt: skip
            until(lambda: own.worker.counts[0] == 1)
        assert thread.result().status_code == 200  # there was time to finish
        assert not own.worker.alive
    finally:
        del model.before


def test_the_key(model: Slow, tokenizer: Tokenizer) -> None:
    with served(model, tokenizer, key="sesame") as own, httpx2.Client(base_url=own.url) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
            answer = http.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
            assert http.post(CHAT, json={}, headers=headers).status_code == 401
        right = {"Authorization": "bearer sesame"}
        assert http.get("/v1/models", headers=right).status_code == 200
        assert http.get("/health").status_code == 200


def test_the_official_client(server: Served, model: Slow, tokenizer: Tokenizer) -> None:
    openai = pytest.importorskip("openai", reason="pip install -c constraints.txt openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [card.id for card in client.models.list()] == [NAME]
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 10, "seed": 4, "temperature": 1.2}
    answer = client.chat.completions.create(messages=QUESTION, **asked)
    expected = local(model, tokenizer, tokenizer.chat(QUESTION), (4,), limit=10, temperature=1.2)
    text = tokenizer.decode(expected.tokens, skip_special=False)
    assert answer.choices[0].message.content == text
    streamed = client.chat.completions.create(messages=QUESTION, stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
    plain = client.completions.create(prompt="2+3=", **asked)
    assert plain.usage.completion_tokens <= 10
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "7*8" * 1000}]
        )
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=QUESTION)
