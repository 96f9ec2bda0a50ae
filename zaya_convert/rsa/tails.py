"""Tails: the last τ tokens of a rollout's reasoning, as text for the next prompt.

τ counts tokens of the model's own tokenizer. A tail's text encodes to at most τ tokens again,
whatever was cut: tokens that a model writes need not be those its tokenizer would choose, and half
a character turns into replacement characters, which take more tokens than were cut. So the length
of an aggregation prompt is bounded by the problem, C·τ and what joining them costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from zaya_convert.rsa.answers import THINK_CLOSE, THINK_OPEN, reasoning_of
from zaya_convert.rsa.generator import Answer
from zaya_convert.rsa.settings import ANSWER
from zaya_convert.runtime.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class TailCutter:
    """Cuts tails for one tokenizer."""

    tokenizer: Tokenizer

    @cached_property
    def specials(self) -> list[str]:
        """Texts that the tokenizer would read as special tokens."""
        added = self.tokenizer.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special and token.content]

    def ids(self, answer: Answer) -> Sequence[int]:
        """The tokens of a rollout: those that were generated, else those of its text."""
        if answer.tokens is not None:
            return answer.tokens
        return self.tokenizer.encode(answer.text, add_bos=False)

    def cut(self, answer: Answer, size: int, carry: str) -> str:
        """The last ``size`` tokens of what is carried on, as text."""
        ids = self.ids(answer)
        close = self.tokenizer.backend.token_to_id(THINK_CLOSE)
        if carry == ANSWER:
            kept = [token for token in ids if token != close]
        elif close is not None and close in ids:
            kept = list(ids[: list(ids).index(close)])
        elif THINK_CLOSE in answer.text:  # not a token of this model
            kept = self.tokenizer.encode(reasoning_of(answer.text), add_bos=False)
        else:
            kept = list(ids)
        opening = self.tokenizer.backend.token_to_id(THINK_OPEN)
        if opening is not None and opening in kept:
            start = kept.index(opening)
            if not self.tokenizer.decode(kept[:start]).strip():
                kept = kept[start + 1 :]
        return self._text(kept, size)

    def _text(self, ids: Sequence[int], size: int) -> str:
        """The text of the last ``size`` ids, shortened until it encodes to no more."""
        text = self._plain(self.tokenizer.decode(ids[-size:]))
        if len(ids) > size:
            text = text.lstrip(_REPLACEMENT)  # the rest of a character that was cut
        while len(again := self.tokenizer.encode(text, add_bos=False)) > size:
            shorter = self._plain(self.tokenizer.decode(again[-size:]).lstrip(_REPLACEMENT))
            # each turn must shorten the text, or a tokenizer that is no inverse would keep us
            text = shorter if len(shorter) < len(text) else text[len(text) // size + 1 :]
        return text

    def _plain(self, text: str) -> str:
        """Without what would be read as a special token, and so could end the user's turn."""
        before = ""
        while text != before:  # what is left may spell another one
            before = text
            for special in self.specials:
                text = text.replace(special, "")
        return text
