"""``Generator``: what Markovian RSA needs of anything that answers messages.

Our runtime is one (``local``), an OpenAI-compatible server another (``endpoint``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from zaya_convert.runtime.generate import Sampling

SEED_BITS = 31  # fits OpenAI's ``seed`` whatever integer a server keeps it in


@dataclass(frozen=True, slots=True)
class Request:
    """One rollout to make.

    Attributes:
        message: what the user says; the generator applies the model's chat template.
        seed: names the noise of this rollout, below ``2 ** SEED_BITS``.
    """

    message: str
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One rollout.

    Attributes:
        text: what was generated, thinking marks included, special tokens as the tokenizer shows
            them; without the stop token.
        tokens: its ids, without the stop token; None where an engine does not tell.
        prompt_tokens: of the whole prompt, chat template included.
        new_tokens: how many were generated; the stop token is not counted.
        finished: "stop" or "length".
        logprobs: of each of ``tokens``, natural logarithms under the unfiltered distribution at
            temperature 1; None where an engine does not tell.
    """

    text: str
    tokens: tuple[int, ...] | None
    prompt_tokens: int
    new_tokens: int
    finished: str
    logprobs: tuple[float, ...] | None = None


class Generator(Protocol):
    """Makes rollouts, each reproducible by its seed.

    Attributes:
        name: of what runs the model, for people.
    """

    name: str

    def generate(
        self,
        requests: Sequence[Request],
        *,
        budget: int,
        sampling: Sampling,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[Answer]:
        """Answer all requests, in their order.

        Args:
            budget: most new tokens of a rollout.
            sampling: temperature, top-p and top-k; its seed is left alone, since each request
                brings its own.
            progress: called with the number of tokens generated since the last call.
        """
        ...


def rollout_seed(seed: int, problem: int, round: int, candidate: int) -> int:
    """The seed of one rollout: the same for every model, another for every rollout."""
    state = np.random.SeedSequence([seed, problem, round, candidate]).generate_state(1, np.uint64)
    return int(state[0]) >> (64 - SEED_BITS)
