"""The text side of a model: do both sides read and write the same tokens?

Weights are compared on tokens, so a tokenizer that numbers them otherwise, a chat template that
asks otherwise and a generation that ends on another token show nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zaya_convert.errors import InputError
from zaya_convert.rsa.local import prompt_ids
from zaya_convert.rsa.loop import message_of
from zaya_convert.rsa.problems import Problem
from zaya_convert.runtime.tokenizer import Tokenizer

_SHOWN = 6


@dataclass(frozen=True)
class TextFigures:
    """What differs.

    Attributes:
        tokens: how many of the reference's have another number or are missing.
        examples: some of these.
        prompts: of how many problems the first round's prompt is another one.
        stops_reference, stops_candidate: tokens that end a generation.
    """

    tokens: int
    examples: list[str]
    prompts: int
    stops_reference: list[int]
    stops_candidate: list[int]

    @property
    def differences(self) -> int:
        """Tokens, prompts, and 1 where no stop token is common to both."""
        stops, theirs = self.stops_reference, self.stops_candidate
        return self.tokens + self.prompts + (bool(stops) and not set(stops) & set(theirs))


def compare(reference: Tokenizer, candidate: Tokenizer, problems: Sequence[Problem]) -> TextFigures:
    """What differs between two tokenizers, their templates and their stop tokens."""
    theirs = candidate.backend.get_vocab()
    other = [t for t, number in reference.backend.get_vocab().items() if theirs.get(t) != number]
    prompts = [message_of(problem, (), ()) for problem in problems]
    return TextFigures(
        len(other),
        sorted(other)[:_SHOWN],
        sum(_ids(reference, text) != _ids(candidate, text) for text in prompts),
        sorted(reference.stop_ids),
        sorted(candidate.stop_ids),
    )


def _ids(tokenizer: Tokenizer, message: str) -> list[int] | None:
    """The prompt; None where the template refuses it."""
    try:
        return prompt_ids(tokenizer, message)
    except InputError:
        return None
