"""``LocalGenerator``: rollouts on an engine of ours, in batches that memory bounds.

Rollouts join and leave one running batch, so that a long one does not keep the others waiting. In
the runtime's exact arithmetic this changes no token: a rollout depends on its prompt and its seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from zaya_convert.errors import InputError
from zaya_convert.rsa.generator import Answer, Request
from zaya_convert.runtime.cache import rows_that_fit
from zaya_convert.runtime.engine import Engine
from zaya_convert.runtime.generate import Decoder, Sampling, Task, logprobs
from zaya_convert.runtime.tokenizer import Tokenizer

_PREFILL_CHUNK = 512  # columns of prompts run at once
_ROWS = 128  # more gain little
_STATE_BYTES = 2 << 30
_REFILL = 4  # new rollouts come in when one row in so many is free: joining copies the states


class LocalGenerator:
    """An engine and its tokenizer.

    Args:
        rows: most rollouts at a time; None: as many as ``state_bytes`` hold, at most 128.
        state_bytes: memory for the states of all rollouts.
    """

    def __init__(
        self,
        engine: Engine[Any],
        tokenizer: Tokenizer,
        *,
        rows: int | None = None,
        state_bytes: int = _STATE_BYTES,
    ) -> None:
        self.name = engine.name
        self.engine, self.tokenizer = engine, tokenizer
        self._rows, self._state_bytes = rows, state_bytes

    def generate(
        self,
        requests: Sequence[Request],
        *,
        budget: int,
        sampling: Sampling,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[Answer]:
        """See ``Generator``.

        Raises:
            InputError: a prompt that leaves no room in the context, or a model that is broken.
        """
        prompts = [prompt_ids(self.tokenizer, request.message) for request in requests]
        self._check(prompts)
        how = Sampling(sampling.temperature, sampling.top_p, sampling.top_k)
        tasks = [
            Task(prompt, budget, how, (request.seed,), self.tokenizer.stop_ids)
            for prompt, request in zip(prompts, requests, strict=True)
        ]
        rows = self._rows or self._affordable(max(map(len, prompts), default=0) + budget)
        tokens: list[list[int]] = [[] for _ in requests]
        told: list[list[float]] = [[] for _ in requests]
        finished = [""] * len(requests)
        decoder = Decoder(self.engine, _PREFILL_CHUNK)
        waiting = 0
        while waiting < len(tasks) or len(decoder):
            free = rows - len(decoder)
            if waiting < len(tasks) and (_REFILL * free >= rows or not len(decoder)):
                # names are numbers in the order of arrival, so they are our indices
                decoder.add(tasks[waiting : waiting + free])
                waiting = min(waiting + free, len(tasks))
            steps = decoder.step()
            found = logprobs(decoder.logits, [step.token for step in steps])
            for step, logprob in zip(steps, found, strict=True):
                finished[step.sequence] = step.finished
                if math.isnan(logprob):
                    raise InputError("the model computes values that are not numbers", self.name)
                if step.finished != "stop":
                    tokens[step.sequence].append(step.token)
                    told[step.sequence].append(logprob)
            progress(len(steps))
        return [
            Answer(
                self.tokenizer.decode(ids, skip_special=False), tuple(ids), len(prompt), len(ids),
                end, tuple(logs),
            )
            for ids, logs, prompt, end in zip(tokens, told, prompts, finished, strict=True)
        ]  # fmt: skip

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        longest, context = max(map(len, prompts), default=0), self.engine.config.max_positions
        if longest >= context:
            raise InputError(
                f"a prompt of {longest} tokens leaves no room in the model's context of {context}; "
                "use shorter problems, or fewer or shorter tails"
            )

    def _affordable(self, length: int) -> int:
        """How many rollouts of this length fit into the memory for states."""
        config = self.engine.config
        length = min(length, config.max_positions)
        return min(_ROWS, rows_that_fit(config, length, self._state_bytes))


def prompt_ids(tokenizer: Tokenizer, message: str) -> list[int]:
    """The tokens a message becomes: the chat template around it, if the model has one."""
    if tokenizer.template:
        return tokenizer.chat([{"role": "user", "content": message}])
    return tokenizer.encode(message)
