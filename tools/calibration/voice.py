"""How the generated exchanges are told: names, phrases, and the shape of a reasoning trace.

A generator draws its numbers, computes the answer and writes the steps; `Voice.tell` puts them into
one of several tones. The phrases vary because activations are what calibration is about: a hundred
traces with one opening would weigh that opening a hundredfold.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NAMES = (
    "Amara", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hiro", "Ines", "Jonas",
    "Kavya", "Lars", "Maren", "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Samir", "Tilda",
    "Umar", "Vera", "Wanda", "Xenia", "Yusuf", "Zora", "Aiko", "Benoit", "Carmen", "Dalia",
)  # fmt: skip

_OPENERS = (
    "Okay, let me work through this.",
    "Let me think about this step by step.",
    "Alright, first I should pin down what is being asked.",
    "Hmm, let me start by writing down what is given.",
    "So the question gives me a few facts. Let me line them up.",
    "First, let me restate the problem in my own words.",
    "Okay, so I need to be careful with this one.",
    "Let's see what we have here.",
    "I'll take this slowly, one step at a time.",
    "Right, let me set this up properly before computing anything.",
    "The user wants a definite answer, so let me derive it and then check it.",
    "Good, this looks manageable. Let me begin with the data.",
)
_LINKS = (
    "Next,", "Then", "Now", "After that,", "Moving on,", "So now", "With that done,", "From there,",
)  # fmt: skip
# First words that may follow a link, in lower case; not names, not "So", nothing that is a link.
_MOVABLE = (
    "The", "There", "That", "These", "Adding", "Subtracting", "Dividing", "It", "If", "In", "A",
    "An", "Both", "Three", "Only",
)  # fmt: skip
_CHECKS = (
    "Wait, let me double-check that.",
    "Let me verify this before answering.",
    "Let me check the result another way.",
    "Does that make sense? Let me test it.",
    "I want to be sure, so let me confirm it.",
    "Before I finish, a quick sanity check.",
    "Hold on, I should make sure I did not slip.",
    "Let me go over it once more from a different angle.",
)
_CLOSERS = (
    "Good, that matches.",
    "That agrees with what I found.",
    "Everything is consistent, so I am confident.",
    "Great, both ways give the same result.",
    "The check works out.",
    "So the answer holds.",
    "Perfect, no contradiction there.",
    "Okay, that settles it.",
)
_REQUESTS = (
    "",
    "",
    "",
    "Explain your reasoning.",
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "Think step by step and give the final answer in \\boxed{}.",
    "Show your work.",
    "Walk me through it.",
    "Keep the final answer short.",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a patient tutor. Explain each step so that a student can follow it.",
    "You are a careful assistant. Check your result before you give it.",
    "Answer precisely and keep the final answer brief.",
)


@dataclass(frozen=True)
class Exchange:
    """A question and its answer with the reasoning before it.

    Attributes:
        kind: the generator's name.
        facts: the drawn quantities, from which a test works the answer out independently.
        answer: the bare answer.
        reply: what follows the reasoning; it holds the answer.
        thinking: the reasoning, without its tags; empty for answers given at once.
    """

    kind: str
    question: str
    thinking: str
    reply: str
    answer: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The exchange as chat messages."""
        content = f"<think>\n{self.thinking}\n</think>\n\n{self.reply}"
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": content if self.thinking else self.reply},
        ]


class Voice:
    """One tone: its random choices, its sign for multiplication, its way to lay out steps."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.x = rng.choice(("*", "×", "*", "×", "\\times"))

    def names(self, count: int) -> list[str]:
        """Different names."""
        return self.rng.sample(NAMES, count)

    def tell(
        self,
        kind: str,
        question: str,
        steps: Sequence[str],
        check: Sequence[str],
        answer: str,
        sentence: str,
        facts: Mapping[str, Any],
    ) -> Exchange:
        """Put a worked problem into words; `sentence` says the answer, as `{}`, in full."""
        rng = self.rng
        request = rng.choice(_REQUESTS)
        boxed = "boxed" in request or rng.random() < 0.3
        told = f"{question} {request}".strip() if rng.random() < 0.7 else f"{question}\n\n{request}"
        thinking = self._thinking(steps, check)
        shown = f"\\boxed{{{answer}}}" if boxed else f"**{answer}**"
        final = sentence.format(shown)
        shape = rng.choice((0, 0, 1, 2, 2))
        if shape == 0:
            reply = final
        elif shape == 1:
            listed = "\n".join(f"{n}. {step}" for n, step in enumerate(steps, 1))
            reply = f"{rng.choice(_HEADS)}\n\n{listed}\n\n{final}"
        else:
            reply = f"{steps[-1]}\n\n{final}"
        return Exchange(kind, told.strip(), thinking, reply, answer, dict(facts))

    def _thinking(self, steps: Sequence[str], check: Sequence[str]) -> str:
        rng = self.rng
        style = rng.randrange(3)
        lines = [rng.choice(_OPENERS)]
        for number, step in enumerate(steps, 1):
            if style == 0:
                lines.append(f"Step {number}: {step}")
            elif style == 1 and number > 1 and step.split()[0] in _MOVABLE:
                lines.append(f"{rng.choice(_LINKS)} {step[0].lower()}{step[1:]}")
            else:
                lines.append(step)
        if check:
            lines += [rng.choice(_CHECKS), *check, rng.choice(_CLOSERS)]
        return ("\n\n" if rng.random() < 0.5 else "\n").join(lines)


_HEADS = (
    "Here is how it works out:",
    "Step by step:",
    "Solution:",
    "The computation:",
    "**Working**",
)


def money(cents: int) -> str:
    """An amount, such as ``$12.05``."""
    return f"${cents // 100}.{cents % 100:02d}"


def listing(items: Sequence[str], word: str = "and") -> str:
    """Items in a sentence: ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"
