"""From tokens to the text that is sent: stop strings, and the reasoning apart where asked for."""

from __future__ import annotations

from collections.abc import Sequence

from zaya_convert.rsa.answers import THINK_CLOSE, THINK_OPEN
from zaya_convert.runtime.tokenizer import Tokenizer


class Until:
    """Passes text on up to the first of some marks; what may be the start of one is held back."""

    def __init__(self, marks: Sequence[str]) -> None:
        self._marks = [mark for mark in marks if mark]
        self._held = ""
        self.found = False

    def push(self, text: str) -> tuple[str, str]:
        """More text; what can go out, and, once a mark is found, what stands behind it."""
        text = self._held + text
        places = [(text.find(mark), mark) for mark in self._marks if mark in text]
        if places:
            place, mark = min(places)
            self._held, self.found = "", True
            return text[:place], text[place + len(mark) :]
        held = max((_overlap(text, mark) for mark in self._marks), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], ""

    def flush(self) -> str:
        """What was held back, at the end."""
        text, self._held = self._held, ""
        return text


class Splitter:
    """Tells reasoning from the rest: what stands before ``</think>``, without the marks.

    Args:
        thinking: the prompt has opened the reasoning already.
    """

    def __init__(self, thinking: bool) -> None:
        self.thinking = thinking
        self._until = Until([THINK_CLOSE])
        self._opening: str | None = None if thinking else ""  # the text so far, while undecided

    def push(self, text: str) -> tuple[str, str]:
        """More text; the reasoning in it, and the rest."""
        if self._opening is not None:
            self._opening += text
            begun = self._opening.lstrip()
            if len(begun) < len(THINK_OPEN) and THINK_OPEN.startswith(begun):
                return "", ""
            text, self._opening = self._opening, None
            if begun.startswith(THINK_OPEN):
                self.thinking, text = True, begun.removeprefix(THINK_OPEN)
        if not self.thinking:
            return "", text
        reasoning, rest = self._until.push(text)
        self.thinking = not self._until.found
        return reasoning, rest

    def flush(self) -> tuple[str, str]:
        """What was held back, at the end: reasoning, and the rest."""
        opening, self._opening = self._opening or "", None
        return self._until.flush(), opening


class Writer:
    """Writes what the tokens of one sequence say.

    Args:
        stops: texts that end it; they are not written.
        splitter: tells reasoning apart, None to leave the marks in the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], splitter: Splitter | None
    ) -> None:
        self._stream = tokenizer.stream(skip_special=False)
        self._until, self._splitter = Until(stops), splitter

    def push(self, token: int) -> tuple[str, str]:
        """One more token; the reasoning and the other text that can go out."""
        return self._passed(self._stream.push(token))

    def flush(self) -> tuple[str, str]:
        """At the end: the reasoning and the other text that are left."""
        parts = [self._passed(self._stream.flush()), self._split(self._until.flush())]
        if self._splitter is not None:
            parts.append(self._splitter.flush())
        return "".join(part[0] for part in parts), "".join(part[1] for part in parts)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._until.found

    @property
    def thinking(self) -> bool:
        """Whether the text ends within reasoning that is told apart."""
        return self._splitter is not None and self._splitter.thinking

    def _passed(self, text: str) -> tuple[str, str]:
        if self._until.found:  # what comes behind a stop string is not written
            return "", ""
        return self._split(self._until.push(text)[0])

    def _split(self, text: str) -> tuple[str, str]:
        return ("", text) if self._splitter is None else self._splitter.push(text)


def thinks(prompt: str) -> bool:
    """Whether a prompt ends within reasoning."""
    return prompt.rfind(THINK_OPEN) > prompt.rfind(THINK_CLOSE)


def _overlap(text: str, mark: str) -> int:
    """The longest end of ``text`` that is a beginning of ``mark``, but not all of it."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
