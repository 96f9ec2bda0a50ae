"""What is sent back: OpenAI's objects, whole or in parts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zaya_convert.runtime.tokenizer import Tokenizer
from zaya_convert.serve.asked import Asked

_LEAST = -9999.0  # stands for minus infinity, which JSON does not have


@dataclass(frozen=True, slots=True)
class Token:
    """A token, and where that was asked for how likely it was.

    Attributes:
        others: the most probable tokens and their logprobs.
    """

    id: int
    logprob: float = 0.0
    others: Sequence[tuple[int, float]] = ()


@dataclass
class Part:
    """A part of one choice, or all of it.

    Attributes:
        reasoning: "" where it is not told apart.
        tokens: all of them, a stop token too, though the text is without it.
        finished: "" before the end, then "stop" or "length".
        thinking: it ends within the reasoning.
    """

    content: str = ""
    reasoning: str = ""
    tokens: list[Token] = field(default_factory=list)
    finished: str = ""
    thinking: bool = False

    def add(self, part: Part) -> None:
        """Take in the part behind this one."""
        self.content += part.content
        self.reasoning += part.reasoning
        self.tokens += part.tokens
        self.finished, self.thinking = part.finished, part.thinking


class Shapes:
    """The objects that answer one request."""

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        kind = "chat.completion" if asked.chat else "text_completion"
        self._head = {
            "id": ("chatcmpl-" if asked.chat else "cmpl-") + uuid.uuid4().hex,
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._offsets = [0] * len(asked.tasks)

    def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
        """All choices and the usage."""
        choices = [
            self._choice(index, part, "message", {"role": "assistant"})
            for index, part in enumerate(parts)
        ]
        counts = sum(len(part.tokens) for part in parts)
        return {**self._head, "choices": choices, "usage": self._usage(counts)}

    def chunk(self, index: int, part: Part, first: bool) -> dict[str, Any]:
        """A part of choice ``index``, which may be the first of it."""
        start = {"role": "assistant"} if first else {}
        choice = self._choice(index, part, "delta", start)
        usage = {"usage": None} if self._asked.include_usage else {}
        return {**self._chunk_head(), "choices": [choice], **usage}

    def last(self, tokens: int) -> dict[str, Any]:
        """The chunk that holds nothing but the usage."""
        return {**self._chunk_head(), "choices": [], "usage": self._usage(tokens)}

    def _chunk_head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._asked.chat else "text_completion"
        return {**self._head, "object": kind}

    def _usage(self, tokens: int) -> dict[str, int]:
        prompt = self._asked.prompt_tokens
        return {
            "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens,
        }  # fmt: skip

    def _choice(self, index: int, part: Part, name: str, start: dict[str, Any]) -> dict[str, Any]:
        asked = self._asked
        if asked.chat:
            text: dict[str, Any] = {name: start | self._texts(part, whole=name == "message")}
        else:
            text = {"text": part.content}
        choice = {
            "index": index,
            **text,
            "logprobs": self._logprobs(index, part) if asked.logprobs is not None else None,
            "finish_reason": part.finished or None,
        }
        if asked.token_ids:
            choice["token_ids"] = [token.id for token in part.tokens]
        return choice

    def _texts(self, part: Part, whole: bool) -> dict[str, Any]:
        """The fields of a message; content is null while the model still reasons."""
        if not self._asked.separate:
            return {"content": part.content}
        if not whole:
            parts = {"reasoning_content": part.reasoning, "content": part.content}
            return {name: text for name, text in parts.items() if text}
        content = None if part.thinking else part.content
        return {"content": content, "reasoning_content": part.reasoning or None}

    def _logprobs(self, index: int, part: Part) -> dict[str, Any]:
        if self._asked.chat:
            return {
                "content": [
                    self._named(token.id, token.logprob)
                    | {"top_logprobs": [self._named(*other) for other in token.others]}
                    for token in part.tokens
                ]
            }
        texts = [self._text(token.id) for token in part.tokens]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob, _LEAST) for token in part.tokens],
            "top_logprobs": [
                {self._text(id): max(logprob, _LEAST) for id, logprob in token.others}
                for token in part.tokens
            ],
            "text_offset": offsets,
        }

    def _named(self, id: int, logprob: float) -> dict[str, Any]:
        text = self._text(id)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(text.encode())}

    def _text(self, id: int) -> str:
        return self._tokenizer.decode([id], skip_special=False)
