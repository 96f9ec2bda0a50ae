"""General prose for the training mix and the held-out texts: sentences from a small grammar.

It keeps the checkpoint from being a calculator only: perplexity and calibration then also see text
whose routing differs from arithmetic. Lines are split by the same hash as the problems.
"""

from __future__ import annotations

import random

from tools.tiny.data import Example, split_of

_WHO = (
    "the old miller", "a young sailor", "the teacher", "my sister", "the baker", "a tired farmer",
    "the doctor", "our neighbour", "the captain", "a small child", "the gardener", "the painter",
)  # fmt: skip
_DID = (
    "walked to the river", "opened the heavy door", "read a long letter", "waited at the station",
    "carried water up the hill", "looked at the dark sky", "sang a quiet song", "sold fresh bread",
    "drew a map of the island", "planted an apple tree", "counted the boats", "lost a silver key",
)  # fmt: skip
_WHEN = (
    "before sunrise", "in the evening", "after the storm", "last winter", "on a warm morning",
    "every Sunday", "late at night", "when the bells rang", "during the harvest", "at noon",
)  # fmt: skip
_WHY = (
    "because the road was closed", "and nobody asked why", "while the rain fell on the roof",
    "although the wind was cold", "so the others could rest", "and then went home again",
    "as if nothing had happened", "but the light was already fading",
)  # fmt: skip


def _sentence(rng: random.Random) -> str:
    who, did, when = rng.choice(_WHO), rng.choice(_DID), rng.choice(_WHEN)
    shape = rng.randrange(4)
    if shape == 0:
        words = f"{who} {did} {when}"
    elif shape == 1:
        words = f"{when}, {who} {did}"
    elif shape == 2:
        words = f"{who} {did} {when}, {rng.choice(_WHY)}"
    else:
        words = f"{who} {did} {rng.choice(_WHY)}"
    return words[0].upper() + words[1:] + "."


def prose_text(rng: random.Random, split: str, sentences: int = 8) -> str:
    """A line of prose of `split`."""
    while True:
        text = " ".join(_sentence(rng) for _ in range(sentences))
        if split_of(text) == split:
            return text


def prose_example(rng: random.Random, split: str) -> Example:
    """A line of prose, learned from its first token on and closed by `<eos>`."""
    return Example(prose_text(rng, split, rng.randint(3, 10)) + "<eos>", 0)
