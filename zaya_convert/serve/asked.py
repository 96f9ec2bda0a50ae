"""``Reader``: from a request's body to what is to be generated, or to an error that says why not.

Fields that would change what is generated, and which are not offered, are refused unless they have
the value that changes nothing; unknown ones are refused too, because a misspelt ``temperature``
should not go unnoticed.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError, UsageError
from zaya_convert.runtime.generate import Sampling, Task
from zaya_convert.runtime.tokenizer import Tokenizer
from zaya_convert.serve.errors import ApiError
from zaya_convert.serve.text import thinks

T = TypeVar("T")

_SEED_BITS = 63
_COMPLETION_TOKENS = 16  # OpenAI's default for plain completions
_ALTERNATIVES = 20  # most of them beside a token's logprob

# Fields that change no token; they are taken and not looked at.
_IGNORED = frozenset((
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "cache_prompt", "parallel_tool_calls",
))  # fmt: skip
# Fields that are not offered, with the values that ask for nothing.
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "ignore_eos": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


@dataclass(frozen=True)
class Asked:
    """A request that makes sense.

    Attributes:
        chat: of the chat endpoint.
        tasks: one a choice, in their order.
        prompt_tokens: of all prompts, each counted once.
        stops: texts that end a choice.
        logprobs: how many alternatives to tell of beside each token's logprob; None: no logprobs.
        stream: answer token by token, and whether with the usage at the end.
        separate: tell the reasoning apart.
        thinking: the prompt ends within reasoning.
        token_ids: tell the tokens too.
    """

    chat: bool
    tasks: Sequence[Task]
    prompt_tokens: int
    stops: Sequence[str]
    logprobs: int | None
    stream: bool
    include_usage: bool
    separate: bool
    thinking: bool
    token_ids: bool


@dataclass(frozen=True)
class Reader:
    """Reads requests for one model.

    Attributes:
        name: what the model is called.
        separate: whether reasoning is told apart where a request does not say.
        most: choices in one request.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    separate: bool
    most: int

    def read(self, body: bytes, chat: bool) -> Asked:
        """Read a body.

        Raises:
            ApiError: 400 for what is wrong or not offered, 404 for another model, 422 for a
                conversation that the chat template refuses.
        """
        fields = _Fields(_parsed(body))
        model = fields.take("model", str)
        if model is not None and model != self.name:
            raise ApiError(404, f"no model {model!r}; this server has {self.name!r}", "model",
                           "model_not_found")  # fmt: skip
        thinking = False
        if chat:
            prompt, thinking = self._conversation(fields)
            prompts = [prompt]
        else:
            prompts = self._prompts(fields)
        n = fields.whole("n", 1, self.most) or 1
        if n * len(prompts) > self.most:
            raise ApiError(400, f"{n * len(prompts)} choices; this server takes at most "
                                f"{self.most} in one request", "n")  # fmt: skip
        limit = fields.whole("max_tokens", 1)
        limit = fields.whole("max_completion_tokens", 1) or limit
        if limit is None:
            limit = self.config.max_positions if chat else _COMPLETION_TOKENS
        sampling, seed = _sampling(fields), fields.whole("seed", 0, 2**_SEED_BITS - 1)
        options = fields.take("stream_options", dict) or {}
        separate = fields.take("separate_reasoning", bool)
        asked = Asked(
            chat=chat,
            tasks=self._tasks(prompts, n, limit, sampling, seed),
            prompt_tokens=sum(map(len, prompts)),
            stops=_stops(fields),
            logprobs=_logprobs(fields, chat),
            stream=fields.take("stream", bool) or False,
            include_usage=options.get("include_usage") is True,
            separate=chat and (self.separate if separate is None else separate),
            thinking=thinking,
            token_ids=fields.take("return_token_ids", bool) or False,
        )
        fields.refuse_rest()
        return asked

    def _tasks(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        limit: int,
        sampling: Sampling,
        seed: int | None,
    ) -> list[Task]:
        """Choice 0 draws the noise of stream (seed,), choice i that of stream (seed, i)."""
        if seed is None:
            seed = secrets.randbits(_SEED_BITS)
        return [
            Task(prompts[i // n], limit, sampling, (seed, i) if i else (seed,),
                 self.tokenizer.stop_ids)
            for i in range(n * len(prompts))
        ]  # fmt: skip

    def _conversation(self, fields: _Fields) -> tuple[Sequence[int], bool]:
        """The tokens of ``messages``, and whether they end within reasoning."""
        messages = fields.take("messages", list)
        if not messages:
            raise ApiError(400, "messages is missing or empty", "messages")
        variables = fields.take("chat_template_kwargs", dict) or {}
        turns = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        try:
            text = self.tokenizer.render(turns, **{"add_generation_prompt": True, **variables})
        except (InputError, TypeError) as error:
            raise ApiError(422, str(error), "messages") from None
        ids = self.tokenizer.backend.encode(text, add_special_tokens=False).ids
        return self._checked(ids, "messages"), thinks(text)

    def _prompts(self, fields: _Fields) -> list[Sequence[int]]:
        """The tokens of ``prompt``: a text, tokens, or a list of either."""
        prompt = fields.take("prompt", (str, list))
        if not prompt:
            raise ApiError(400, "prompt is missing or empty", "prompt")
        one = isinstance(prompt, str) or all(_is_whole(token) for token in prompt)
        prompts: list[Sequence[int]] = []
        for part in [prompt] if one else prompt:
            if isinstance(part, list) and all(_is_whole(token) for token in part):
                ids = part
            elif isinstance(part, str):
                ids = self.tokenizer.encode(part)
            else:
                raise ApiError(400, "prompt has to be a text, token ids, or a list of either",
                               "prompt")  # fmt: skip
            prompts.append(self._checked(ids, "prompt"))
        return prompts

    def _checked(self, ids: Sequence[int], param: str) -> Sequence[int]:
        context, rows = self.config.max_positions, self.config.vocab_rows
        if not ids:
            raise ApiError(400, f"{param} holds no tokens", param)
        if len(ids) >= context:
            raise ApiError(
                400,
                f"this model's context is {context} tokens; the prompt has {len(ids)}, which "
                "leaves no room for an answer",
                param,
                "context_length_exceeded",
            )
        if not 0 <= min(ids) <= max(ids) < rows:
            raise ApiError(400, f"token ids have to be in 0..{rows - 1}", param)
        return ids


class _Fields:
    """The fields of a body, taken one by one."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._left = fields

    def take(self, name: str, kind: type[T] | tuple[type[Any], ...]) -> T | Any | None:
        """A field of some type, None where it is missing or null."""
        value = self._left.pop(name, None)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if value is not None and (
            not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        ):
            expected = _NAMES[float] if float in kinds else " or ".join(_NAMES[k] for k in kinds)
            raise ApiError(400, f"{name} has to be {expected}", name)
        return value

    def whole(self, name: str, least: int, most: int | None = None) -> int | None:
        """A whole number within bounds."""
        value = self.take(name, int)
        if value is not None and (value < least or (most is not None and value > most)):
            bounds = f"at least {least}" if most is None else f"in {least}..{most}"
            raise ApiError(400, f"{name} is {value}, and has to be {bounds}", name)
        return value

    def refuse_rest(self) -> None:
        """Make sure that nothing else was asked for."""
        for name, value in self._left.items():
            if name in _IGNORED or value is None:
                continue
            if name not in _NEUTRAL:
                raise ApiError(400, f"unknown field {name!r}", name, "unknown_parameter")
            if value not in _NEUTRAL[name]:
                raise ApiError(400, f"{name} is not offered by this server", name,
                               "unsupported_parameter")  # fmt: skip


_NAMES: dict[type, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false",
    list: "a list", dict: "an object",
}  # fmt: skip


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
        json.dumps(fields, ensure_ascii=False).encode()  # escapes can write half a character
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body has to be a JSON object")
    return fields


def _message(message: Any, param: str) -> dict[str, Any]:
    """A turn of the conversation, its content as text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, f"{param} has to be an object with a role", param)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_of(part, f"{param}.content") for part in content)
    if not isinstance(content, str | None):
        raise ApiError(400, f"{param}.content has to be a text or a list", f"{param}.content")
    return {**message, "content": content or ""}


def _text_of(part: Any, param: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise ApiError(400, f"{param} may hold text only", param)
    return text


def _sampling(fields: _Fields) -> Sampling:
    temperature, top_p = (fields.take(name, (int, float)) for name in ("temperature", "top_p"))
    top_k = fields.whole("top_k", -1) or 0
    try:
        return Sampling(
            1.0 if temperature is None else float(temperature),
            1.0 if top_p is None else float(top_p),
            max(top_k, 0),
        )
    except (UsageError, OverflowError) as error:
        raise ApiError(400, str(error)) from None


def _stops(fields: _Fields) -> Sequence[str]:
    stop = fields.take("stop", (str, list)) or []
    stops = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(text, str) and text for text in stops):
        raise ApiError(400, "stop has to be a text or a list of texts, none empty", "stop")
    return stops


def _logprobs(fields: _Fields, chat: bool) -> int | None:
    """How many alternatives are asked for; None: no logprobs."""
    if not chat:
        return fields.whole("logprobs", 0, _ALTERNATIVES)
    wanted = fields.take("logprobs", bool)
    alternatives = fields.whole("top_logprobs", 0, _ALTERNATIVES)
    if alternatives and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    return (alternatives or 0) if wanted else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
